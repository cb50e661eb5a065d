"""Whether weights of few bits can be made here, before anything starts."""

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.few_bits import INSTALL, probe
from fedkrso_app.training.device import device


def check(config: Config) -> None:
    """Raise :class:`ConfigError` where ``compute-weights`` asks for what this machine cannot make."""
    if not config.few_bits:
        return
    kind, place = config.compute_weights, device(config.device)
    try:
        probe(kind, place)
    except ImportError as error:
        raise ConfigError(f"compute-weights = {kind!r} needs bitsandbytes ({error}): {INSTALL}.") from None
    except Exception as error:  # kernels of another version of CUDA, a device that it does not know
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"compute-weights = {kind!r} does not work on this {place.type} ({reason}); set it to 'float', or "
            f"install another version of the library: {INSTALL}."
        ) from None
