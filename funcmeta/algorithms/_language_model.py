"""A standard LSTM language model with tied embeddings."""

from torch import Tensor, nn

from funcmeta._check import check_count, check_fraction


class LanguageModel(nn.Module):
    """An LSTM between an embedding and a decoder that share their weight.

    Args:
        vocabulary: number of words.
        width: units of the embedding and of each layer.
        layers: number of LSTM layers.
        dropout: probability to drop an entry of what enters and leaves the LSTM, while training.

    Raises:
        ArgumentError: a size is below 1, or ``dropout`` not in [0, 1).

    Examples:
        >>> model = LanguageModel(vocabulary=10, width=4)
        >>> scores, hidden = model(torch.tensor([1, 2, 3]), model.start())
        >>> scores.shape
        torch.Size([3, 10])

    Source: Press and Wolf (2017), "Using the Output Embedding to Improve Language Models", for the shared weight.
    """

    def __init__(self, vocabulary: int, width: int, *, layers: int = 1, dropout: float = 0.0) -> None:
        for name, value in (("vocabulary", vocabulary), ("width", width), ("layers", layers)):
            check_count(name, value)
        check_fraction("dropout", dropout)
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.LSTM(width, width, layers)
        self.decoder = nn.Linear(width, vocabulary)
        self.drop = nn.Dropout(dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores of each next word, [words, ..., vocabulary], from words [words, ...]; and the next hidden state."""
        out, hidden = self.layers(self.drop(self.embedding(words)), hidden)
        return self.decoder(self.drop(out)), hidden

    def start(self, *rows: int) -> tuple[Tensor, Tensor]:
        """The hidden state before the first word, for one text, or for so many at once."""
        zero = self.embedding.weight.new_zeros((self.layers.num_layers, *rows, self.layers.hidden_size))
        return zero, zero
