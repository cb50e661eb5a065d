"""FFA-LoRA (arXiv:2403.12313): FedIT with A frozen at one common draw, which makes the mean of the products exact."""

from fedkrso_app.strategies.fedit import FedIT, FedITLocal


class FFALoraLocal(FedITLocal):
    """Client half: A comes from the run's seed and never travels; B and the head are trained."""

    factors = ("B",)

    def learning_rate(self) -> float:
        return self.config.ffa_lora.learning_rate


class FFALora(FedIT):
    """Server half: the mean of B."""

    local = FFALoraLocal
    arxiv = "2403.12313"
    learning_rate_key = "ffa-lora.learning-rate"
