"""A Transformer layer of your own with a mixture of experts as its feedforward block: trained, counted, looked at."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseffn

D_MODEL, VOCABULARY, LENGTH = 64, 256, 32


class Layer(nn.Module):
    """Pre-norm attention and a feedforward block; any method's layer fits in its place."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D_MODEL, num_heads=4, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)])
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(h, h, h, attn_mask=future, need_weights=False)[0]
        return x + self.ffn(self.norms[1](x))


def main(steps: int = 60) -> None:
    torch.manual_seed(0)
    dense = sparseffn.DenseConfig(d_model=D_MODEL, d_ff=512)
    # As many parameters as the dense block, a quarter of its compute.
    wanted = sparseffn.SigmaMoEConfig(d_model=D_MODEL, n_experts=16, expert_size=32, k=4, n_layers=2)
    config = sparseffn.match(wanted, dense.num_params()).config
    print(f"parameters {config.num_params():,} (dense {dense.num_params():,})")
    print(f"FLOPs a token {config.forward_flops():,} (dense {dense.forward_flops():,})")

    layers = [Layer(config.build()) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, D_MODEL), *layers, nn.Linear(D_MODEL, VOCABULARY))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 20))
    for step in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (8,))
        tokens = torch.stack([text[i : i + LENGTH + 1] for i in starts])
        with sparseffn.collect_stats(model) as stats:
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + stats.balance_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.2f}, balancing loss {stats.balance_loss.item():.4f}")


if __name__ == "__main__":
    main()
