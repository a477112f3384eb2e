"""`serve`: a run's best checkpoint behind HTTP."""

from __future__ import annotations

from collections.abc import Callable

from hstu_dist.commands.trained import load_trained, run_of
from hstu_dist.commands.use import Words
from hstu_dist.errors import UserError
from hstu_dist.inference.cache import StateCache
from hstu_dist.inference.config import ServeConfig


def serve_run(words: Words[ServeConfig], say: Callable[[str], None]) -> None:
    """Serves until it is asked to stop.

    Args:
        words: which run, and the settings of the command.
        say: prints a line for the user.

    Raises:
        UserError: the run cannot be used, a package is missing, or the address cannot be listened on.
    """
    try:
        from hstu_dist.inference.server import Served, serve
    except ImportError as error:
        raise UserError(f"serve: needs the package {error.name}", "run pip install '.[serve]' in the clone") from error
    settings = words.settings
    cache = StateCache(settings.cache_mib << 20) if settings.cache_mib else None
    trained = load_trained(*run_of(words.run, words.overrides), settings, cache)
    description = {"run": trained.run.name, "step": trained.step}
    say(f"serving step {trained.step} of {trained.run}: {len(trained.inputs.items)} items")
    serve(Served(model=trained.model, inputs=trained.inputs, description=description), settings, say)
