"""Draw the pictures of docs/gallery.md by running the code of the page.

python docs/gallery.py
"""

import re
from pathlib import Path

PAGE = Path(__file__).with_name("gallery.md")


def main() -> None:
    names: dict = {}
    for source, picture in re.findall(r"```python\n(.*?)```(?:\n\n!\[.*?\]\((\S+)\))?", PAGE.read_text(), re.S):
        exec(source, names)
        if picture:
            path = PAGE.parent / picture
            path.parent.mkdir(exist_ok=True)
            names["figure"].savefig(path, dpi=80)


if __name__ == "__main__":
    main()
