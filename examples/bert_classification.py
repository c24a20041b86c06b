"""Fine-tune BERT for classification, without computing padding.

    python examples/bert_classification.py                     # half a minute, random weights
    python examples/bert_classification.py --folder FOLDER     # from a BERT of Hugging Face

Data is made here: reviews of 5 to 90 words that praise or blame, "not" turning the meaning, with
clauses in between that mean nothing. Their lengths differ, so that half of a batch is padding: with
``use_flash_attn`` the layers see the other half alone. Prints accuracy on reviews never seen, and
how long a pass takes without and with padding.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from flash_attn.models.bert import BertModel

THINGS = ["film", "book", "meal", "song", "game", "trip", "phone", "chair", "story", "play"]
GOOD = ["great", "lovely", "fine", "brilliant", "superb", "charming"]
BAD = ["dull", "awful", "poor", "tedious", "dreadful", "weak"]
ADVERBS = ["really", "quite", "so", "very", "rather", "truly"]
NAMES = ["anna", "ben", "carla", "dev", "emma", "finn"]
PLACES = ["paris", "oslo", "lima", "cairo", "delhi", "rome"]
FILLERS = ("{name} came from {place} ,", "we met {name} in {place} ,", "it rained in {place} ,")
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


def review(draw: random.Random) -> tuple[str, int]:
    """Return a review, and 1 if it praises."""
    is_good, is_turned = draw.random() < 0.5, draw.random() < 0.5
    word = draw.choice(GOOD if is_good else BAD)
    fillers = int(draw.triangular(0, 14, 0))
    parts = [
        draw.choice(FILLERS).format(name=draw.choice(NAMES), place=draw.choice(PLACES))
        for _ in range(fillers)
    ]
    claim = f"the {draw.choice(THINGS)} was {'not ' if is_turned else ''}"
    claim += f"{draw.choice(ADVERBS)} {word} ,"
    parts.insert(draw.randrange(len(parts) + 1), claim)
    return " ".join(parts), int(is_good != is_turned)


def word_encoder() -> tuple[Callable[[str], list[int]], int]:
    """Return a tokenizer with a token for each word of the reviews, and how many there are."""
    fillers = " ".join(FILLERS).replace("{name}", "").replace("{place}", "").split()
    words = [*fillers, *["the", "was", "not"], *THINGS, *GOOD, *BAD, *ADVERBS, *NAMES, *PLACES]
    tokens = {word: i for i, word in enumerate([*SPECIAL, *dict.fromkeys(words)])}

    def encode(text: str) -> list[int]:
        inside = [tokens[word] for word in text.split()]
        return [tokens["[CLS]"], *inside, tokens["[SEP]"]]

    return encode, len(tokens)


def batch_of(encode, pad: int, count: int, draw: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and mask ``(count, seqlen)``, and labels ``(count,)``."""
    texts, labels = zip(*(review(draw) for _ in range(count)))
    rows = [torch.tensor(encode(text)) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None], torch.tensor(labels)


class Classifier(nn.Module):
    """BERT and a linear layer on what it pools."""

    def __init__(self, bert: BertModel, num_classes: int = 2):
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(bert.config.hidden_dropout_prob)
        self.head = nn.Linear(bert.config.hidden_size, num_classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return logits ``(batch, num_classes)``."""
        return self.head(self.dropout(self.bert(tokens, attention_mask=mask).pooler_output))


def small_config(vocab_size: int, **options) -> BertConfig:
    """A BERT of two layers of four heads."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.1,
    )
    for name, value in {"use_flash_attn": True, "fused_dropout_add_ln": True, **options}.items():
        setattr(config, name, value)
    return config


def load(folder: Path) -> tuple[BertModel, Callable[[str], list[int]]]:
    """Return a BERT of a Hugging Face folder and its tokenizer."""
    from tokenizers import Tokenizer

    config = BertConfig.from_pretrained(folder, local_files_only=True)
    config.use_flash_attn = config.fused_dropout_add_ln = True
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_position_embeddings)
    model = BertModel.from_pretrained(folder, config)
    return model, lambda text: tokenizer.encode(text).ids


def train(model: Classifier, batches: Callable, steps: int, seconds: float, peak: float) -> list:
    """Train for at most ``steps`` and ``seconds``; return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    losses, start = [], time.perf_counter()
    for step in range(steps):
        done = max(step / steps, (time.perf_counter() - start) / seconds)
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 30) * math.cos(0.5 * math.pi * done)
        tokens, mask, labels = batches()
        loss = F.cross_entropy(model(tokens, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    return losses


@torch.no_grad()
def beside_padding(model: Classifier, tokens: Tensor, mask: Tensor) -> tuple[float, float, float]:
    """Compare with the same weights and every token of the batch, padding too.

    Returns:
        Seconds of a pass without and with padding (medians of interleaved runs), and the largest
        difference of logits.
    """
    config = BertConfig.from_dict(model.bert.config.to_dict())
    config.use_flash_attn = config.fused_dropout_add_ln = False
    padded = Classifier(BertModel(config), model.head.out_features).eval()
    padded.load_state_dict(model.state_dict())
    times = {id(model): [], id(padded): []}
    for _ in range(7):
        for each in (model, padded):
            start = time.perf_counter()
            each(tokens, mask)
            times[id(each)].append(time.perf_counter() - start)
    difference = (model(tokens, mask) - padded(tokens, mask)).abs().max().item()
    medians = (sorted(found)[len(found) // 2] for found in times.values())
    return (*medians, difference)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a BERT of Hugging Face to start from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=40.0, help="of training at most")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3, 5e-5 from a folder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.folder is None:
        encode, vocab_size = word_encoder()
        bert = BertModel(small_config(vocab_size))
    else:
        bert, encode = load(options.folder)
    model = Classifier(bert)
    draw, pad = random.Random(0), bert.config.pad_token_id or 0
    peak = options.learning_rate or (5e-5 if options.folder else 1e-3)
    batches = lambda: batch_of(encode, pad, options.batch, draw)  # noqa: E731
    train(model, batches, options.steps, options.seconds, peak)
    tokens, mask, labels = batch_of(encode, pad, 400, random.Random(1 << 20))
    model.eval()
    with torch.no_grad():
        accuracy = (model(tokens, mask).argmax(-1) == labels).float().mean().item()
    print(f"accuracy on 400 new reviews: {accuracy:.1%} (chance: 50%)")
    unpadded, padded, difference = beside_padding(model, tokens, mask)
    print(f"{1 - mask.float().mean():.0%} of the batch is padding: a pass takes", end=" ")
    print(f"{1e3 * unpadded:.0f} ms without it, {1e3 * padded:.0f} ms with it;", end=" ")
    print(f"logits differ by {difference:.1e}")
    return accuracy


if __name__ == "__main__":
    main()
