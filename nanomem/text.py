"""Text to tokens: the tokenizers, and books as arrays of tokens."""
import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from .cli import UserError, nearest

HERE = Path(__file__).parent

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""   # GPT-2's own splits
TOKENIZERS = ("gpt2-4k", "gpt2", "bytes")


def tokenizer(name):
    """A tiktoken.Encoding: `gpt2`, `gpt2-4k` (the first 4,096 tokens of GPT-2, 3.4 bytes each) or `bytes`."""
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as e:
            raise UserError(f"the gpt2 vocabulary could not be downloaded ({type(e).__name__}): point "
                            "TIKTOKEN_CACHE_DIR at a folder that has it, or use gpt2-4k, which needs none") from None
    if name == "gpt2-4k":
        lines = (HERE / "gpt2-4k.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    elif name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
    else:
        raise UserError(f"no tokenizer is called {name}: {nearest(name, TOKENIZERS)}")
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})


def vocabulary_hash(enc):
    """SHA-256 of the bytes of all tokens in order: it tells whether shards were made with this very vocabulary."""
    return hashlib.sha256(b"".join(enc.decode_single_token_bytes(i) for i in range(enc.eot_token))).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Books from text

@dataclass
class Books:
    """The books of one split. Lists have an entry for each book."""
    enc: tiktoken.Encoding
    names: list
    tokens: list    # uint16 arrays: end-of-text, so that the first token has a prediction too, then the text

    def __len__(self):
        return len(self.tokens)

    def fingerprint(self):
        """SHA-256 of tokenizer, names, lengths and the ends of the texts: it tells whether these are the same books."""
        digest = hashlib.sha256(vocabulary_hash(self.enc).encode())
        for name, tokens in zip(self.names, self.tokens):
            digest.update(f"{name} {len(tokens)} {tokens[:64].tolist()} {tokens[-64:].tolist()}".encode())
        return digest.hexdigest()


def read_text(path):
    """A text file with its line ends made LF. Raises UserError if it is not there, empty or not UTF-8."""
    if any(c in str(path) for c in "*?") and not Path(path).exists():
        raise UserError(f"no file matches {path}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")     # a byte order mark is no text
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start} is {e.object[e.start]:#x}): convert it") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not text.strip():
        raise UserError(f"{path} holds no text")
    return text


def encode(enc, text):
    return np.array([enc.eot_token, *enc.encode_ordinary(text)], dtype="<u2")


def from_texts(enc, texts):
    """Books held in memory, from a list of (name, text)."""
    names, texts = zip(*texts)
    return Books(enc, list(names), [encode(enc, text) for text in texts])


def hold_out(texts):
    """Split a list of (name, text): the last tenth of the books is for validation. Of a single book, its last tenth."""
    if len(texts) > 1:
        n = max(1, len(texts) // 10)
        return dict(train=texts[:-n], validation=texts[-n:])
    name, text = texts[0]
    if len(text) < 100:
        raise UserError(f"{name} is too short to train on: {len(text)} characters")
    cut = len(text) * 9 // 10
    paragraph = text.rfind("\n\n", len(text) * 8 // 10, cut)
    cut = paragraph + 1 if paragraph > 0 else cut  # at the end of a paragraph, if one is near
    return dict(train=[(name, text[:cut])], validation=[(name + ", the end", text[cut:])])
