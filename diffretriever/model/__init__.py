"""The model's flat files as a package, so that everything here may import their pure functions and tables.

The files lie at the top of the source tree, where transformers copies them from; a wheel holds them in this folder. In
a checkout the folder holds links to them, which type checkers and editors follow. Python itself reads the tree, since
git does not make links on every system. A *model* is loaded through `AutoModel.from_pretrained` alone.
"""

from pathlib import Path

_tree = Path(__file__).resolve().parents[2]
if (_tree / "modeling_diffretriever.py").is_file():
    __path__.insert(0, str(_tree))
