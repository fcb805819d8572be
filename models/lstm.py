"""LSTM language models."""

from torch import Tensor, nn

State = tuple[Tensor, Tensor]  # hidden and cell, (layers, batch, width) each


class LanguageModel(nn.Module):
    """Embedding, LSTM and a decoder that shares the embedding's weights; dropout between all of them.

    Source: the authors' meta_language_model.py, RNNLM.
    """

    def __init__(self, num_layers: int, vocabulary_size: int, embed_size: int = 512, dropout: float = 0.5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embed_size)
        self.lstm = nn.LSTM(embed_size, embed_size, num_layers, dropout=dropout)
        self.decoder = nn.Linear(embed_size, vocabulary_size)
        self.dropout = nn.Dropout(dropout)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Token indices (length, batch) and the state, None for zeros -> logits (length, batch, vocabulary), state."""
        hidden, state = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.decoder(self.dropout(hidden)), state
