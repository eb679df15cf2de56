"""Parcel time series of simulated runs with planted events and artefacts, which a ranker must distinguish.

Three unlike kinds, so that no ranker is tuned to one:

- ``bursts``: white noise with a short memory and weak activity of disjoint networks all the time; the events are bursts
  of a single network, the artefacts spikes of one frame with any pattern.
- ``fmri``: twelve overlapping two-sided networks that fluctuate all the time, noise of unequal strength, drift, a
  global signal, breathing, and a heartbeat sampled too slowly; the events are haemodynamic responses of two or three
  networks at a time, the artefacts spikes of one to three frames along the rim, in a slice, or along a gradient.
- ``short``: smooth networks and noise with a short memory; the events are 3 to 7 frames of a single network, the
  artefacts spikes of one or two frames.

With ``slow``, all also hold bursts of 10 to 20 frames with an independent signal in every parcel.

`stationary` makes runs without events: noise in which no place in time differs from another.

Shape suffixes: R parcels; T frames; W windows; N networks; 3 axes; _RN weights of networks in parcels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, signal, stats

# By kind: low, middle and high. A burst is confined to an eighth of the parcels.
SNR = {"bursts": (0.1, 0.2, 0.4), "fmri": (0.3, 0.6, 1.2), "short": (0.1, 0.2, 0.4)}
EVENT_SHARE = {"bursts": 0.2, "fmri": 0.2, "short": 0.25}  # of the windows


@dataclass(frozen=True)
class Run:
    """A simulated run and what was planted in it.

    `roi_RT` are raw parcel means, float32; `centre_R3` their centres in mm; `energy_W` the mean energy of the events in
    each window. `event_W` marks the windows that hold an event: the fifth of them (``short``: the fourth) with the most
    planted energy (none without any). `artefact_W` marks those that an artefact hits and that hold no event.
    """

    roi_RT: np.ndarray
    centre_R3: np.ndarray
    energy_W: np.ndarray
    event_W: np.ndarray
    artefact_W: np.ndarray


def simulate(
    kind: str, snr: float, slow: bool, seed: int, centre_R3: np.ndarray, windows: int, frames: int = 5, tr: float = 0.72
) -> Run:
    """A run of a kind.

    Parameters
    ----------
    kind : str
        ``bursts``, ``fmri`` or ``short``.
    snr : float
        Mean energy of the planted events in the windows that hold them, over that of all else but the artefacts.
    slow : bool
        Whether there are slow incoherent bursts.
    seed : int
        Runs of the same seed with another kind, SNR or `slow` are independent.
    centre_R3 : float array
        Parcel centres in mm.
    windows, frames : int
        Windows of the run; frames of a window.
    tr : float
        Seconds between frames.
    """
    rng = np.random.default_rng([seed, list(SNR).index(kind), round(1000 * snr), slow])
    length = windows * frames
    events_RT, rest_RT, artefact_RT, hit_T = _KINDS[kind](rng, centre_R3, length, tr)
    if slow:
        _add_slow(rng, artefact_RT, hit_T)
    energy_W = _window_mean(np.mean(events_RT**2, axis=0), frames)
    event_W = np.zeros(windows, dtype=bool)
    event_W[np.argsort(-energy_W, kind="stable")[: max(1, round(EVENT_SHARE[kind] * windows))]] = True
    event_W &= energy_W > 0
    amplitude = np.sqrt(snr * np.mean(rest_RT**2) / energy_W[event_W].mean())
    roi_RT = amplitude * events_RT + rest_RT + artefact_RT
    # Any unit, and parcels of unequal size in it.
    roi_RT = rng.uniform(500, 900, (len(roi_RT), 1)) + rng.uniform(2, 8, (len(roi_RT), 1)) * roi_RT
    artefact_W = hit_T.reshape(windows, frames).any(axis=1) & ~event_W
    return Run(roi_RT.astype(np.float32), centre_R3, amplitude**2 * energy_W, event_W, artefact_W)


def _window_mean(value_T: np.ndarray, frames: int) -> np.ndarray:
    return value_T.reshape(-1, frames).mean(axis=1)


def _memory(rng: np.random.Generator, rows: int, length: int, keep: float) -> np.ndarray:
    """Autoregressive noise of order one and unit variance."""
    noise = rng.standard_normal((rows, length + 50))
    return signal.lfilter([np.sqrt(1 - keep**2)], [1, -keep], noise, axis=1)[:, 50:]


def _band(rng: np.random.Generator, rows: int, length: int, tr: float, low: float, high: float) -> np.ndarray:
    """Noise of a band of frequencies in Hz, unit variance."""
    spectrum = np.fft.rfft(rng.standard_normal((rows, length)), axis=1)
    hertz = np.fft.rfftfreq(length, tr)
    values = np.fft.irfft(spectrum * ((hertz >= low) & (hertz <= high)), length, axis=1)
    return values / np.maximum(values.std(axis=1, keepdims=True), 1e-12)


def _unit(map_RN: np.ndarray) -> np.ndarray:
    """Columns of unit mean square."""
    return map_RN / np.maximum(np.sqrt(np.mean(map_RN**2, axis=0)), 1e-12)


def _bursts(rng: np.random.Generator, centre_R3: np.ndarray, length: int, tr: float) -> tuple[np.ndarray, ...]:
    parcels = len(centre_R3)
    seeds = rng.choice(parcels, min(8, parcels), replace=False)
    distance_RN = np.linalg.norm(centre_R3[:, None] - centre_R3[seeds], axis=2)
    member_RN = np.eye(len(seeds))[distance_RN.argmin(axis=1)]
    map_RN = member_RN * rng.uniform(0.5, 1.5, member_RN.shape)

    events_RT = np.zeros((parcels, length))
    for _ in range(max(1, length // 35)):
        long = int(rng.integers(8, 20))
        first = int(rng.integers(max(1, length - long)))
        course_T = np.hanning(long + 2)[1:-1] * rng.uniform(0.7, 1.3) * rng.choice([-1, 1])
        stop = min(length, first + long)
        events_RT[:, first:stop] += np.outer(map_RN[:, rng.integers(len(seeds))], course_T[: stop - first])

    rest_RT = _memory(rng, parcels, length, 0.4) + 0.3 * map_RN @ _memory(rng, len(seeds), length, 0.8)
    artefact_RT, hit_T = np.zeros((parcels, length)), np.zeros(length, dtype=bool)
    for _ in range(max(1, length // 120)):
        frame = rng.integers(length)
        artefact_RT[:, frame] += rng.uniform(2, 4) * rng.standard_normal(parcels)
        hit_T[frame] = True
    return events_RT, rest_RT, artefact_RT, hit_T


def _response(tr: float) -> np.ndarray:
    """The haemodynamic response to a moment: two gamma densities, peak 1."""
    t = np.arange(0, 24, tr)
    values_T = stats.gamma.pdf(t, 6) - stats.gamma.pdf(t, 16) / 6
    return values_T / values_T.max()


def _fmri(rng: np.random.Generator, centre_R3: np.ndarray, length: int, tr: float) -> tuple[np.ndarray, ...]:
    parcels = len(centre_R3)
    low_3, high_3 = centre_R3.min(axis=0), centre_R3.max(axis=0)

    def blobs(count: int, width: tuple[float, float]) -> np.ndarray:
        """Two-sided smooth maps, (R, count)."""
        peak_N3 = rng.uniform(low_3, high_3, (count, 3))
        mirrored_N3 = peak_N3 * [-1, 1, 1]
        width_N = rng.uniform(*width, count)
        both = [np.square(centre_R3[:, None] - at_N3).sum(axis=2) for at_N3 in (peak_N3, mirrored_N3)]
        return _unit(sum(np.exp(-square_RN / (2 * width_N**2)) for square_RN in both))

    map_RN = blobs(12, (22, 40))
    response_T = _response(tr)
    events_RT = np.zeros((parcels, length + len(response_T) + 6))
    for _ in range(max(1, length // 45)):
        few = rng.choice(12, rng.integers(2, 4), replace=False)
        pattern_R = map_RN[:, few] @ (rng.choice([-1.0, 1.0], len(few)) * rng.uniform(0.7, 1.3, len(few)))
        course_T = np.convolve(response_T, np.ones(rng.integers(1, 7)))
        first = rng.integers(length)
        events_RT[:, first : first + len(course_T)] += np.outer(pattern_R, course_T / course_T.max())
    events_RT = events_RT[:, :length]

    rim_R = np.linalg.norm((centre_R3 - centre_R3.mean(axis=0)) / np.maximum(np.ptp(centre_R3, axis=0), 1), axis=1)
    rim_R /= np.sqrt(np.mean(rim_R**2))
    phase_T = np.cumsum(2 * np.pi * tr * (0.3 + 0.03 * _band(rng, 1, length, tr, 0, 0.05)[0]))
    breath_T = np.sin(phase_T) * (1 + 0.3 * _band(rng, 1, length, tr, 0, 0.05)[0])
    beat_T = np.sin(np.cumsum(2 * np.pi * tr * (1.1 + 0.05 * _band(rng, 1, length, tr, 0, 0.1)[0])))
    strength_R = rng.lognormal(0, 0.3, (parcels, 1))
    trend_T = np.linspace(-1, 1, length)
    drift_RN = blobs(3, (40, 60)) * rng.standard_normal(3)
    rest_RT = (
        0.8 * strength_R * _memory(rng, parcels, length, 0.3)
        + 0.6 * map_RN @ _band(rng, 12, length, tr, 0.008, 0.1) / np.sqrt(12)
        + 0.3 * drift_RN @ np.stack([trend_T, trend_T**2, np.sin(np.pi * trend_T)])
        + 0.4 * np.outer(rng.uniform(0.6, 1.4, parcels), _band(rng, 1, length, tr, 0.01, 0.1))
        + 0.25 * np.outer(rim_R, breath_T)
        + 0.25 * np.outer(blobs(4, (12, 25)).sum(axis=1) / 2, beat_T)
    )

    artefact_RT, hit_T = np.zeros((parcels, length)), np.zeros(length, dtype=bool)
    slope_R3 = _unit(centre_R3 - centre_R3.mean(axis=0))
    slice_R = np.unique(np.round(centre_R3[:, 2] / 20), return_inverse=True)[1]
    patterns: tuple[Callable[[], np.ndarray], ...] = (
        lambda: rim_R**2 * rng.choice([-1, 1], parcels, p=[0.2, 0.8]),
        lambda: 2.0 * (slice_R == rng.integers(slice_R.max() + 1)),
        lambda: slope_R3 @ rng.standard_normal(3) / np.sqrt(3),
    )
    for _ in range(max(1, length // 32)):
        spike, long = int(rng.integers(length)), int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))
        pattern_R = patterns[rng.integers(3)]() * rng.uniform(2, 4) * rng.choice([-1, 1])
        artefact_RT[:, spike : spike + long] += pattern_R[:, None]
        hit_T[spike : spike + long] = True
    return events_RT, rest_RT, artefact_RT, hit_T


def _short(rng: np.random.Generator, centre_R3: np.ndarray, length: int, tr: float) -> tuple[np.ndarray, ...]:
    parcels, networks = len(centre_R3), 8
    map_RN = _smooth_maps(rng, centre_R3, networks, (18, 32))
    events_RT = np.zeros((parcels, length))
    for _ in range(max(1, length // 18)):
        long = int(rng.integers(3, 8))
        first = int(rng.integers(length - long + 1))
        course_T = np.sin(np.pi * (np.arange(long) + 0.5) / long) * rng.choice([-1, 1]) * rng.uniform(0.7, 1.3)
        events_RT[:, first : first + long] += np.outer(map_RN[:, rng.integers(networks)], course_T)

    rest_RT = _memory(rng, parcels, length, 0.4) + 0.5 * map_RN @ _memory(rng, networks, length, 0.7) / np.sqrt(
        networks
    )
    artefact_RT, hit_T = np.zeros((parcels, length)), np.zeros(length, dtype=bool)
    for _ in range(max(1, length // 100)):
        spike, long = int(rng.integers(length)), int(rng.choice([1, 2], p=[0.8, 0.2]))
        of_networks_R = map_RN @ rng.standard_normal(networks) / np.sqrt(networks)
        pattern_R = of_networks_R if rng.random() < 0.5 else rng.standard_normal(parcels)
        artefact_RT[:, spike : spike + long] += pattern_R[:, None] * rng.uniform(1.5, 3)
        hit_T[spike : spike + long] = True
    return events_RT, rest_RT, artefact_RT, hit_T


def _smooth_maps(
    rng: np.random.Generator, centre_R3: np.ndarray, networks: int, width: tuple[float, float]
) -> np.ndarray:
    """Maps around random places, Gaussian in space with a width in mm of this range; (R, N)."""
    peak_N3 = rng.uniform(centre_R3.min(axis=0), centre_R3.max(axis=0), (networks, 3))
    square_RN = np.square(centre_R3[:, None] - peak_N3).sum(axis=2)
    return _unit(np.exp(-square_RN / (2 * rng.uniform(*width, networks) ** 2)))


_KINDS = {"bursts": _bursts, "fmri": _fmri, "short": _short}


def stationary(seed: int, length: int, parcels: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Stationary noise: eight smooth networks that fluctuate slowly, and white noise.

    Returns
    -------
    roi_RT, centre_R3 : float32 arrays
        Raw parcel means, and centres in mm.
    """
    rng, margin, width = np.random.default_rng(seed), 30, 2.5  # in frames
    centre_R3 = rng.uniform([-70, -90, -60], [70, 90, 60], (parcels, 3))
    map_RN = _smooth_maps(rng, centre_R3, 8, (30, 30))
    course_NT = ndimage.gaussian_filter1d(rng.standard_normal((8, length + 2 * margin)), width, axis=1)
    course_NT = course_NT[:, margin:-margin] * np.sqrt(2 * np.sqrt(np.pi) * width)  # of unit variance
    noise_RT = 0.7 * map_RN @ course_NT + rng.standard_normal((parcels, length))
    return (600 + 5 * noise_RT).astype(np.float32), centre_R3.astype(np.float32)


def _add_slow(rng: np.random.Generator, artefact_RT: np.ndarray, hit_T: np.ndarray) -> None:
    """Slow bursts in place: smooth noise, each parcel its own; their middle half counts as hit."""
    length = len(hit_T)
    for _ in range(max(1, length // 150)):
        long = int(rng.integers(10, 21))
        first = int(rng.integers(max(1, length - long)))
        stop = min(length, first + long)
        noise_RT = ndimage.gaussian_filter1d(rng.standard_normal((len(artefact_RT), long)), 2, axis=1)
        noise_RT *= 2.0 * np.hanning(long + 2)[1:-1] / noise_RT.std()
        artefact_RT[:, first:stop] += noise_RT[:, : stop - first]
        hit_T[first + long // 4 : stop - long // 4] = True
