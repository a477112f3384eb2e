"""Everything that a rank has to say, with times, in a file of its own in the run folder; the terminal shows less."""

from __future__ import annotations

import faulthandler
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hstu_dist.distributed.process_group import World

_PACKAGE = "hstu_dist"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def rank_log(folder: Path, world: World) -> Iterator[None]:
    """Writes log messages of all ranks, stack traces and crashes into `folder`/rank-N.log; later attempts append."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{world.rank}.log").open("a", buffering=1) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter(_FORMAT))
        package, root = logging.getLogger(_PACKAGE), logging.getLogger()
        shown, package_level = [(other, other.level) for other in root.handlers], package.level
        # the terminal shows of each rank what it showed before
        for other, level in shown:
            other.setLevel(max(level, package.getEffectiveLevel()))
        root.addHandler(handler)
        package.setLevel(logging.INFO)
        # a fatal signal leaves its stack there; it must not replace a handler that is set already
        crashes = not faulthandler.is_enabled()
        if crashes:
            faulthandler.enable(file)
        try:
            package.info("rank %d of %d starts on %s", world.rank, world.size, world.device)
            yield
        except BaseException:
            # to the file only: who catches it says it to the user
            handler.handle(package.makeRecord(_PACKAGE, logging.ERROR, __file__, 0, "ended by", (), sys.exc_info()))
            raise
        finally:
            if crashes:
                faulthandler.disable()
            root.removeHandler(handler)
            package.setLevel(package_level)
            for other, level in shown:
                other.setLevel(level)
