"""The text job: a character model on the English prose of Python's own language reference."""

import re
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

import triton_rnn
from triton_rnn.demo.settings import DemoError, Settings
from triton_rnn.demo.training import OURS, Batch, Comparison, Model, recurrent_layer

PROMPT = "The "
SAMPLE_LENGTH = 480
TEMPERATURE = 0.5

_TYPOGRAPHY = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{NO-BREAK SPACE}": " ",
    }
)
# A paragraph with fewer letters than this is code, a grammar rule or a table.
_LEAST_SHARE_OF_PROSE = 0.9
_LEAST_PARAGRAPH = 40


def load_text() -> str:
    """Prose of ``pydoc_data.topics`` in plain ASCII, one paragraph a line.

    Raises:
        DemoError: this Python was packaged without its topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DemoError(f"this Python comes without the text of its manual ({error})") from error
    # Sorted by name: the text does not depend on the order in which Python's build wrote them.
    return "\n".join(line for name in sorted(topics) for line in plain_paragraphs(topics[name]))


def plain_paragraphs(topic: str) -> list[str]:
    """The paragraphs of one topic that are sentences, without marks of emphasis or bullets."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", topic.translate(_TYPOGRAPHY)):
        words = paragraph.replace("**", "").lstrip("*+-= \n").split()
        line = " ".join(words).encode("ascii", "ignore").decode("ascii")
        if len(line) < _LEAST_PARAGRAPH or line[-1] not in ".:?!":
            continue
        if sum(c.isalpha() or c in " .,'" for c in line) >= _LEAST_SHARE_OF_PROSE * len(line):
            kept.append(line)
    return kept


class CharacterModel(Model):
    """Embedding, recurrent layer, Linear: scores of the next character at every position.

    Input (N, T) of character numbers; output (N, T, number of characters).
    """

    def __init__(self, library: ModuleType, settings: Settings, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, settings.hidden)
        self.recurrent = recurrent_layer(library, settings, settings.hidden)
        self.head = nn.Linear(settings.hidden, characters)

    def forward(self, characters: Tensor) -> Tensor:
        output, _ = self.recurrent(self.embedding(characters))
        return cast(Tensor, self.head(output))


class TextJob:
    """The data of the text demo and what is done with it, on the CPU until it is trained on.

    Raises:
        DemoError: the text is too short for ``seq_len``.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.text = load_text()
        self.alphabet = sorted(set(self.text))
        number = {character: index for index, character in enumerate(self.alphabet)}
        self.numbers = torch.tensor([number[character] for character in self.text])
        if settings.seq_len + 1 > len(self.text):
            raise DemoError(
                f"argument --seq-len: {settings.seq_len} is longer than the text"
                f" ({len(self.text)} characters)"
            )
        self.windows = self.numbers.unfold(0, settings.seq_len + 1, 1)
        generator = torch.Generator().manual_seed(settings.seed)
        self.places = torch.randint(
            len(self.windows), (settings.steps, settings.batch), generator=generator
        )

    def build(self, library: ModuleType) -> CharacterModel:
        return CharacterModel(library, self.settings, len(self.alphabet))

    def batch_at(self, step: int) -> Batch:
        """(N, T) characters from random places and the (N, T) that follow them."""
        rows = self.windows[self.places[step]]
        return rows[:, :-1], rows[:, 1:]

    @staticmethod
    def loss(scores: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy in nats per character."""
        return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())

    def sample(self, comparison: Comparison, length: int = SAMPLE_LENGTH) -> str:
        """Text that our model writes after PROMPT, a character at a time, its state carried on."""
        model = cast(CharacterModel, comparison.models[OURS])
        device = self.settings.device
        generator = torch.Generator().manual_seed(self.settings.seed)
        # A version of the manual without one of the prompt's letters must not stop the demo.
        prompt = "".join(c for c in PROMPT if c in self.alphabet) or self.alphabet[0]
        text = prompt
        numbers = torch.tensor([[self.alphabet.index(c) for c in prompt]], device=device)
        state = None
        with torch.no_grad(), triton_rnn.use_backend(self.settings.backend):
            while len(text) < length:
                output, state = model.recurrent(model.embedding(numbers), state)
                scores = model.head(output[0, -1]).float().cpu() / TEMPERATURE
                drawn = torch.multinomial(scores.softmax(0), 1, generator=generator)
                text += self.alphabet[int(drawn)]
                numbers = drawn.view(1, 1).to(device)
        return text
