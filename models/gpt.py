"""A transformer language model. Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019."""

import math

from torch import Tensor, nn


class GPT(nn.Module):
    """Embedding with learned positions, causal pre-norm transformer, and a decoder that shares the embedding's weights.

    Dropout acts on the embedding and inside the layers.
    """

    def __init__(
        self, num_layers: int, vocabulary_size: int, embed_size: int = 512, dropout: float = 0.1, seq_len: int = 512
    ):
        super().__init__()
        num_heads = math.gcd(embed_size, 4)  # 4 wherever the width can be divided by it
        layer = nn.TransformerEncoderLayer(
            embed_size, num_heads, 4 * embed_size, dropout, activation="gelu", norm_first=True
        )
        self.embedding = nn.Embedding(vocabulary_size, embed_size)
        self.positions = nn.Embedding(seq_len, embed_size)
        self.dropout = nn.Dropout(dropout)
        self.transformer = nn.TransformerEncoder(
            layer, num_layers, norm=nn.LayerNorm(embed_size), enable_nested_tensor=False
        )
        self.decoder = nn.Linear(embed_size, vocabulary_size)
        self.decoder.weight = self.embedding.weight
        for parameter in self.transformer.parameters():  # torch starts all layers from the same weights
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in (self.embedding, self.positions):
            nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, hidden: tuple[()] | None = None) -> tuple[Tensor, tuple[()]]:
        """Token indices (length, batch), up to seq_len of them -> logits (length, batch, vocabulary), and no state."""
        length = len(tokens)
        positions = self.positions.weight[:length, None]  # (length, 1, width)
        mask = nn.Transformer.generate_square_subsequent_mask(length, tokens.device)
        features = self.transformer(self.dropout(self.embedding(tokens) + positions), mask, is_causal=True)
        return self.decoder(features), ()
