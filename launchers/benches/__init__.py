"""What `slim-brain bench` can measure.

A module for each name of `BENCHES`, with `Bench`, the settings of its sizes, `SMALL`, those of a quick try, and
`run(bench, repeat, folder, begun) -> Result`, which works in `folder` and calls `begun(what)` before each stage.
"""

BENCHES = {
    "shards": "conversion and reading beside nilearn and a compressed .npz of the same run",
    "saliency": "what each ranker chooses in simulated runs with planted events and artefacts, and its cost",
    "gather": "sparse patch gathers and ragged pooling beside dense implementations, forward and backward",
    "memory": "peak memory and FLOPs of a training step at full size, counted without a GPU",
    "launches": "calls of a training step, which a GPU has to launch one by one, against limits",
    "gpu": "the bare training step on a GPU: samples/s, idle time, peak memory beside the forecast, MFU",
    "data": "loading of training samples beside what training takes, and beside webdataset and zarr alone",
    "starts": "CPU time until each command shows its help, and until it refuses a wrong call",
    "adaptation": "fine-tuning of all weights, by LoRA, above frozen stages, of the head alone: scores and cost",
    "train": "samples/s with 1 and 2 processes, the trainer beside the bare model step, checkpoints",
}
