"""One HTML page with everything inside: text, tables, interactive charts, light and dark.

`blocks` has what a page consists of, `pages` the HTML, `embedding` the numbers in it, `figures` the
same blocks as pictures and tables; page.js draws them with plotly's JavaScript, which its Python
package holds (4.8 MB of the page). A reader needs no network, and without JavaScript still has the
text and the tables.
"""

from olmoe_jax.reporting.blocks import (
    Chart,
    Cube,
    Explorer,
    Passage,
    Prose,
    Search,
    Series,
    Table,
)
from olmoe_jax.reporting.pages import num_bytes, page

__all__ = [
    "Chart",
    "Cube",
    "Explorer",
    "Passage",
    "Prose",
    "Search",
    "Series",
    "Table",
    "num_bytes",
    "page",
]
