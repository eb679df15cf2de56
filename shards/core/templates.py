"""Text made from jinja2 templates, which lie in the folder `templates` of a package.

Values are escaped in HTML and left as they are in any other text. A name that a template uses and that is not given is
an error.
"""

from __future__ import annotations

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape


def render(name: str, *packages: str, **values: object) -> str:
    """Fill in a template.

    Parameters
    ----------
    name : str
        File name of the template; `.html` has its values escaped.
    packages : str
        Packages with a folder `templates`, in which this one and those it includes are looked up, the first one first.
    values : object
        What the template shows.
    """
    return _environment(packages).get_template(name).render(values)


@cache
def _environment(packages: tuple[str, ...]) -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in packages]),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
