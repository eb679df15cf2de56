"""Render jinja2 templates from the folder `templates` of a package.

Values are escaped in HTML, but not in other text. A variable of a template without a value is an error.
"""

from __future__ import annotations

from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape


def render(name: str, *packages: str, **values: object) -> str:
    """Render a template.

    Parameters
    ----------
    name : str
        File name of the template. In `.html` files, values are escaped.
    packages : str
        Packages with a folder `templates`, which are searched in this order for the template and its includes.
    values : object
        Variables of the template.
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
