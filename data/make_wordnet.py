"""Make ``wordnet_glosses.xz``: what WordNet 3.0 says its nouns mean, and of which supersense each is.

    python data/make_wordnet.py /usr/share/wordnet   # Debian: wordnet-base
    python data/make_wordnet.py FOLDER               # any folder with the published ``data.noun``

A line is a supersense (the lexicographer's file, such as ``animal``), a tab and a gloss without its quoted examples.
Each gloss stands once; those of several supersenses, and the two supersenses with fewer than 100 glosses (``Tops`` and
``motive``), are left out. Lines are in order. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

SUPERSENSES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
).split()  # in the order of the lexicographer's files, from 03
FEWEST = 100


def read_glosses(path: Path) -> dict[str, set[str]]:
    """Every gloss of ``data.noun``, with its supersenses."""
    found = defaultdict(set)
    for line in path.read_text("ascii").splitlines():
        if not line.startswith(" "):  # the licence
            synset, gloss = line.split(" | ", 1)
            text = re.split(r'[;:,] *"', gloss)[0]
            found[" ".join(text.split()).rstrip("; ")].add(SUPERSENSES[int(synset.split()[1]) - 3])
    return found


def main(folder: Path, out: Path) -> None:
    glosses = read_glosses(folder / "data.noun")
    lines = sorted((min(senses), text) for text, senses in glosses.items() if text and len(senses) == 1)
    sizes = Counter(sense for sense, _ in lines)
    lines = [f"{sense}\t{text}\n" for sense, text in lines if sizes[sense] >= FEWEST]
    out.write_bytes(lzma.compress("".join(lines).encode("ascii"), preset=9 | lzma.PRESET_EXTREME))
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    out.with_suffix(".sha256").write_text(f"{digest}  {out.name}\n")
    print(len(lines), "glosses,", out.stat().st_size, "bytes", digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "wordnet_glosses.xz")
