"""Recorded steps as CUDA graphs. Written without a GPU at hand, and not yet run on one.

``tests/test_static.py`` holds on a CPU that a step depends on nothing but its memory; ``tests/test_graphs.py`` holds on
CUDA that a graph has the bits of a step that is not recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.training.device import device
from fedkrso_app.training.static import Call, Recorder


class Graphs(Recorder):
    """Records on a CUDA device. All graphs of a round share their memory: one runs at a time, and none leaves anything
    in it for another."""

    def __init__(self, place: torch.device) -> None:
        super().__init__(self._capture)
        index = torch.cuda.current_device() if place.index is None else place.index
        self.place, self.generator = torch.device("cuda", index), torch.cuda.default_generators[index]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A stream beside the usual one, which a recording needs, for what is recorded and what is not. And a state of
        its own for the generator that dropout draws from: graphs hold on to it, one that failed leaves it unusable."""
        before = self.generator.graphsafe_get_state()
        self.generator.graphsafe_set_state(self.generator.clone_state())
        self.stream, self.pool = torch.cuda.Stream(self.place), torch.cuda.graph_pool_handle()
        usual = torch.cuda.current_stream(self.place)
        self.stream.wait_stream(usual)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            usual.wait_stream(self.stream)
            self.generator.graphsafe_set_state(before)

    def _capture(self, call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may go on using the device; nothing is computed while a graph is made
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                call()
        except RuntimeError:
            self.generator.graphsafe_set_state(self.generator.clone_state())
            raise
        graph.replay()
        return graph.replay


def recorder(config: Config) -> Recorder | None:
    """What records the local steps of a run; None where they are done as ever, by the key ``captured-steps``.

    Raises :class:`ConfigError` where they are to be recorded and cannot.
    """
    if config.captured_steps != "on":
        return None
    place = device(config.device)
    if place.type != "cuda":
        raise ConfigError(
            f"captured-steps = 'on' needs a CUDA device, and this process computes on {place.type}; set it to 'off'."
        )
    return Graphs(place)
