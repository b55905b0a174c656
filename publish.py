"""Releases: build, check and push the folders that `AutoModel.from_pretrained(..., trust_remote_code=True)` loads.

python publish.py list
python publish.py build RELEASE_NAME --output DIR
python publish.py build --base ID_OR_DIR [--adapter ID_OR_DIR] --output DIR [--name NAME]
python publish.py check DIR
python publish.py push NAME_OR_DIR --repo-id ORG/NAME [--private] [--tag v1-0] [--dry-run]
python publish.py push --all --org ORG

It is `diffretriever publish`, to be run from the source tree.
"""

import sys

from diffretriever.cli.publish import main

if __name__ == "__main__":
    sys.exit(main())
