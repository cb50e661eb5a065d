"""FFA-LoRA (arXiv:2403.12313): FedIT with A frozen at one common draw, which makes the mean of the products exact."""

from dataclasses import dataclass

from fedkrso_app.config import Settings, need_positive
from fedkrso_app.strategies.fedit import FedIT, FedITLocal
from fedkrso_app.strategies.lora import Lora


@dataclass(frozen=True)
class FFALoraSettings(Settings):
    table = "ffa-lora"
    learning_rate: float

    def __post_init__(self) -> None:
        need_positive("ffa-lora.learning-rate", self.learning_rate)


class FFALoraLocal(FedITLocal):
    """Client half: A comes from the run's seed and never travels; B and the head are trained."""

    factors = ("B",)

    def learning_rate(self) -> float:
        return self.config.of(FFALoraSettings).learning_rate


class FFALora(FedIT):
    """Server half: the mean of B."""

    half = FFALoraLocal
    settings = (Lora, FFALoraSettings)
    arxiv = "2403.12313"
    learning_rate_key = "ffa-lora.learning-rate"
