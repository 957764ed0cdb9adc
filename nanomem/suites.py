"""What bench.py trains and measures: the sizes and rates of a suite, and the tasks with their models."""
import math
from dataclasses import dataclass, field, replace

VOCAB = 320                                                      # of untrained models: that of bytes, rounded up
BYTES = dict(tokenizer="bytes")                                  # for the embedded book: small models, small vocabulary
POSITIONS = (0, 512, 1024, 2048, 8192, 32_768, 1 << 40)   # in a book: a column of the report ends at each
READ = (1024, 16_384, 262_144)                                   # tokens before a measurement of cost; and --read
REPLAY_SEGMENTS = (2, 4, 8, 16, 32)                              # K, segments through which replay is measured


@dataclass
class Suite:
    tasks: str = "recall,cost"   # which, with commas between them, or all
    models: str = ""             # which, or all; without it those that the task was made for, or all
    layers: int = 2              # of the models that read books, and of those whose cost is measured
    heads: int = 2               # attention heads
    width: int = 64              # channels
    seg: int = 64                # S, tokens in a segment
    equal: bool = True           # as many parameters as gpt, within 3%, with wider or narrower MLPs where needed
    steps: int = 30              # training steps on books
    task_steps: int = 0          # training steps on a synthetic task; 0: as many as the task needs
    batch: int = 8               # B, books side by side
    segments: int = 16           # K, segments in a BPTT window
    interleave: int = 1          # books that a batch element alternates between
    interleave_len: int = 1      # segments from one book before the next has its turn
    lr: float = 4e-3             # peak learning rate of AdamW on books
    muon: float = 0.04           # peak learning rate of Muon on books
    search: str = ""             # multiples of both that are tried on books for a tenth of the steps: 0.5,1,2
    upto: int = 32_768           # tokens of each held-out book that are scored; 0: all
    read: int = 16_384           # tokens before the last measurement of cost; the longest text of needle
    seed: int = 1                # of the weights, the order of the books and the training texts
    seeds: int = 1               # how many seeds, from that one on
    compile: bool = False        # compile both models whose training speed `cost` compares


@dataclass
class Task:
    """A synthetic task: how models are trained on it, and how they are tested."""
    about: str                 # what the columns of its table are, and what was done
    train: dict                # flags of train.py
    tests: dict                # tokens in a text -> the task with its settings
    texts: int                 # that a test reads at the shortest length; of longer texts fewer, as many tokens in all
    batch: int = 64            # texts side by side
    edges: tuple = ()          # distances at which a column ends; without them, a column for each length
    models: tuple = ()         # the models it was made for; all where it is empty
    others: str = ""           # settings of all other models: segments so short that they need their memory
    text_segments: int = 0     # segments in a training text, where that is more than a BPTT window
    long_texts: bool = False   # let the memory hold the whole text (model.for_length), up to --read
    fewest: int = 2            # texts that a test reads, however long they are
    longest: dict = field(default_factory=dict)   # model -> its longest text, where longer ones take too much time
    guess: str = "chance 3%"   # what is right without a memory of keys

    def flags(self, settings, steps=0):
        """The flags of train.py for a model with these settings, for `steps` steps where that is not 0. Where a text is
        several BPTT windows long there are more steps, so that as many texts are read."""
        windows = max(1, self.text_segments // int(settings.get("segments", self.train["segments"])))
        return dict(self.train, data=self.train["data"] + f":bptt_windows={windows}" * (windows > 1),
                    steps=(steps or self.train["steps"]) * windows)

    def tests_for(self, name, read):
        """The tests of a model, without texts that are too long."""
        most = min(read, self.longest.get(name, read)) if self.long_texts else math.inf
        return {T: test for T, test in self.tests.items() if T <= most}


SMALL, NARROW = dict(layers=2, heads=2, width=64), dict(layers=2, heads=2, width=32)
SLOW = dict(full=8192, landmark=16_384)   # their time grows with the square of the text
NEWEST = "a text holds two values: naming the newer one, whatever the key, is right for 54 to 75%"


def recall(pairs, S, batch, steps, texts):
    """Texts of 8 segments of S tokens, in training and in the test; in training with 1 to `pairs` pairs, which is
    learned sooner. The columns end where segments do."""
    return Task(f"by tokens back to the answer: {pairs} pairs, texts of 8 segments of {S} tokens, {steps} steps",
                dict(SMALL, data=f"recall:pairs={pairs}:mixed=yes", batch=batch, segments=8, seg=S, steps=steps),
                {8 * S: f"recall:pairs={pairs}:asks=3"}, texts, edges=tuple(range(0, 8 * S + 1, S)))


def needles(settings, asks, lengths):
    """The tests of needle: at the first length as many questions as in training, in longer texts one for each needle,
    so that no answer can help the next one."""
    return {T: f"needle:{settings}:asks={1 if T > lengths[0] else asks}" for T in lengths}


def and_controls(gca):
    """GCA as it was trained, and the same weights with chunks that are retrieved in two other ways."""
    return gca, f"{gca}/retrieval=random", f"{gca}/retrieval=recent"


TASKS = dict(
    recall=recall(8, S=16, batch=32, steps=200, texts=512),
    recall2=recall(2, S=16, batch=32, steps=200, texts=512),
    recall32=recall(32, S=128, batch=4, steps=400, texts=64),
    recall512=recall(8, S=64, batch=8, steps=200, texts=128),
    delayed=Task(
        "by tokens since the pair was last seen: one pair in the first 16 tokens, questions from token 64 on, all with "
        "the same answer; trained on texts of 8 segments of 16 tokens, with gradient through `segments` of them, "
        "tested on 16",
        dict(SMALL, data="delayed:gap=64", batch=32, segments=8, seg=16, steps=120),
        {256: "delayed:gap=64"}, texts=1024, edges=(0, 16, *range(48, 257, 32)), text_segments=8,
        models=("memformer", "memformer:segments=4", "memformer:segments=2", "memformer:segments=1", "rmt", "hmt", "xl",
                "gpt")),
    mqar=Task(
        "by tokens since the pair: 16 pairs, then as many questions, in texts of 128 tokens, which are one call, or "
        "segments of 16 where that is said; attention windows of 16 tokens, unless another number is said",
        dict(SMALL, data="mqar:pairs=16", batch=32, segments=1, seg=128, steps=300),
        {128: "mqar:pairs=16"}, texts=1024, edges=(0, 16, 32, 64, 128), others=":seg=16:segments=8",
        models=("mamba:state=8", "hybrid:state=8:window=16", "bmojo_f:state=8:window=16",
                *[f"bmojo:state=8:window=16:eidetic={more}" for more in ("32", "16", "32:select=random",
                                                                         "32:select=16-48")],
                "bmojo:mix=window:window=16", "bmojo:mix=window:window=128")),
    needle=Task(
        "by tokens in the text: trained on 64, in segments of 16 where it is said; 2 needles, each asked for 3 times, "
        "in longer texts once; gca retrieves 4 chunks of 4 tokens",
        dict(NARROW, data="needle:pairs=2:notice=4:asks=3", batch=32, segments=1, seg=64, steps=900),
        needles("pairs=2:notice=4", 3, (64, 1024, 4096, 16_384, 65_536)), texts=1024, batch=8,
        long_texts=True, fewest=32, longest=SLOW, guess=NEWEST,
        models=(*and_controls("gca:chunk=4:bypass=no"), "window:window=16", "full"),
        others=":seg=16:segments=4"),
    needle1k=Task(
        "by tokens in the text: as needle, trained on 1,024 tokens with 32 questions for each needle",
        dict(NARROW, data="needle:pairs=2:notice=4:asks=32", batch=8, segments=1, seg=1024, steps=800),
        needles("pairs=2:notice=4", 32, (1024, 4096, 16_384, 65_536, 2 ** 18, 2 ** 20)), texts=32, batch=8,
        long_texts=True, fewest=32, longest=SLOW, guess=NEWEST,
        models=(*and_controls("gca:chunk=4:bypass=no:bank=256:window=-1"), "window:window=16", "full:window=-2"),
        others=":seg=64:segments=16"),
    hops=Task(
        "by tokens in the text: trained on 256; a needle leads from a key to another key, and from that to the value",
        dict(NARROW, layers=3, data="needle:pairs=2:hops=2:notice=8:asks=10", batch=16, segments=1, seg=256,
             steps=4000),
        needles("pairs=2:hops=2:notice=8", 10, (256, 1024, 4096, 16_384)), texts=256, batch=8, long_texts=True,
        fewest=32, longest=SLOW, guess=NEWEST,
        models=("gca:chunk=4:bypass=no:bank=64", "gca:chunk=4:bypass=no:bank=64:groups=2", "full:seg=64:segments=4"),
        others=":seg=64:segments=4"),
    retain=Task(
        "by tokens since the fact: segments of 4 tokens; pools of 16 vectors, of which each segment replaces 2, and "
        "stores of 64 and 512; trained on texts of 16 segments, tested on 256",
        dict(SMALL, data="retain", batch=64, segments=16, seg=4, steps=400),
        {1024: "retain"}, texts=256, edges=(0, 4, 8, 16, 32, 48, 64, 128, 256, 512, 1024),
        models=("gpt", "memoryllm", "mplus:ask=self:query=1:store=512", "mplus:ask=self:query=1:store=64")),
)
TASKS["recall_bytes"] = replace(
    TASKS["recall"], about="as recall, with states of 32 KB: " + TASKS["recall"].about,
    models=("window:window=31", "rmt:mem=127", "hmt:mem=15:bank=8", "memformer:mem=128", "memoryllm:slots=62",
            "mplus:new=8:slots=24:store=20", "mamba:state=60", "deltanet:state=52", "infini:heads=1", "titans",
            "bmojo_f", "bmojo:window=2:eidetic=6", "gca:bank=5", "landmark:bank=7"))
TASKS["needle8"] = replace(
    TASKS["needle"], about="by tokens in the text: trained as in needle, with 2 needles; the tests have 8",
    tests={T: "needle:pairs=8:notice=4" for T in (1024, 16_384)}, texts=64,
    models=("gca:chunk=4:bypass=no", *(f"{name}:seg=16:segments=4" for name in ("landmark", "titans_mag", "bmojo"))),
    guess="naming the newest of a text's values is right for 28 to 30%")
TASKS["noise"] = replace(
    TASKS["mqar"], about="by tokens since the pair: as mqar, with noise in place of blanks",
    train=dict(TASKS["mqar"].train, data="mqar:pairs=16:noise=yes"), tests={128: "mqar:pairs=16:noise=yes"})

BOOKS = ("books", "passage", "reach", "rates")                   # measured of the model that was trained on books
UNTRAINED = dict(cost=(), race=("gpt",), replay=("memformer",))  # of a new model -> the models it was made for, or all
ON_BOOKS = (*BOOKS, "race")                                      # what cannot be done without the books
ORDER = (*BOOKS, *TASKS, *UNTRAINED)                             # of the report
FIRST = ("gpt", "window", "full")   # what says most is done first: no memory, a short one that is exact, a long one

SUITES = dict(
    laptop={},   # the defaults
    night=dict(   # 30M parameters with gpt2-4k, 100M tokens
               models="all", layers=8, heads=8, width=512, seg=512, batch=16, segments=4, steps=3052,
               search="0.25,0.5,1", seeds=2, read=2 ** 20, upto=0,
               tasks="books,passage,recall,delayed,mqar,noise,needle,needle1k,retain,cost,replay"))
