"""The series job: the yearly sunspot number forecast from the years before it."""

import csv
from dataclasses import dataclass
from importlib import resources
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

import triton_rnn
from triton_rnn.demo.settings import DemoError, Settings
from triton_rnn.demo.training import Batch, Comparison, Model, recurrent_layer

TRAINING_SHARE = 0.75


def load_series() -> tuple[list[int], list[float]]:
    """Years and their mean sunspot number; source and licence stand at the top of the CSV."""
    file = resources.files("triton_rnn.demo").joinpath("sunspots.csv")
    lines = [line for line in file.read_text("utf-8").splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    return [int(row["year"]) for row in rows], [float(row["sunspot_number"]) for row in rows]


class Forecaster(Model):
    """Recurrent layer, Linear on its last step: (N, T, 1) values to the (N, 1) that come next."""

    def __init__(self, library: ModuleType, settings: Settings) -> None:
        super().__init__()
        self.recurrent = recurrent_layer(library, settings, 1)
        self.head = nn.Linear(settings.hidden, 1)

    def forward(self, values: Tensor) -> Tensor:
        output, _ = self.recurrent(values)
        return cast(Tensor, self.head(output[:, -1]))


@dataclass(frozen=True)
class Forecast:
    """One-step forecasts of the validation years, in sunspot numbers, and their RMSE, by name.

    The name ``last value`` is the naive forecast: next year will be like this one.
    """

    years: list[int]
    truth: list[float]
    forecasts: dict[str, list[float]]
    rmse: dict[str, float]


class SeriesJob:
    """The data of the series demo: the first three quarters train, the last years validate.

    Mean and standard deviation come from the training years alone, so nothing of the validation
    years is known while training.

    Raises:
        DemoError: ``seq_len`` leaves no training window.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.years, values = load_series()
        self.split = round(TRAINING_SHARE * len(values))
        if settings.seq_len >= self.split:
            raise DemoError(
                f"argument --seq-len: {settings.seq_len} leaves nothing to train on"
                f" ({self.split} training years)"
            )
        self.values = torch.tensor(values)
        training = self.values[: self.split]
        self.mean, self.deviation = float(training.mean()), float(training.std())
        normalised = (self.values - self.mean) / self.deviation
        windows = normalised.unfold(0, settings.seq_len + 1, 1)
        self.inputs, self.targets = windows[:, :-1, None], windows[:, -1:]
        self.training_windows = self.split - settings.seq_len
        generator = torch.Generator().manual_seed(settings.seed)
        self.places = torch.randint(
            self.training_windows, (settings.steps, settings.batch), generator=generator
        )

    def build(self, library: ModuleType) -> Forecaster:
        return Forecaster(library, self.settings)

    def batch_at(self, step: int) -> Batch:
        """(N, T, 1) windows drawn at random from the training years, (N, 1) next values."""
        return self.inputs[self.places[step]], self.targets[self.places[step]]

    @staticmethod
    def loss(forecast: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of normalised values."""
        return nn.functional.mse_loss(forecast, target)

    def forecast(self, comparison: Comparison) -> Forecast:
        """Forecast each validation year from the true values of the years before it."""
        inputs = self.inputs[self.training_windows :].to(self.settings.device)
        truth = self.values[self.split :]
        forecasts = {"last value": self.values[self.split - 1 : -1]}
        with torch.no_grad(), triton_rnn.use_backend(self.settings.backend):
            for name, model in comparison.models.items():
                forecasts[name] = model(inputs)[:, 0].cpu() * self.deviation + self.mean
        rmse = {
            name: float((forecast - truth).square().mean().sqrt())
            for name, forecast in forecasts.items()
        }
        return Forecast(
            self.years[self.split :],
            truth.tolist(),
            {name: forecast.tolist() for name, forecast in forecasts.items()},
            rmse,
        )
