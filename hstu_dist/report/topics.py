"""What the pages say of each result file: its heading, what its figures mean, and which of them are quoted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Topic:
    """How a result file is shown.

    Attributes:
        title: heading.
        note: what a reader must know to read its figures.
        metrics: columns of a table of rows in README.md; none: its line in the digest alone.
        contenders: whose rows that table has; none: everybody's.
        headlines: what the digest quotes, `text → (case, metric, a, b)` of a ratio.
    """

    title: str
    note: str = ""
    metrics: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    headlines: Mapping[str, tuple[str, str, str, str]] = field(default_factory=dict)


TOPICS: Mapping[str, Topic] = {
    "ml1m": Topic(
        title="MovieLens-1M",
        note="Means over the seeds, quartiles in brackets, or one seed where there are none; ranked against all items "
        "but the history that the model sees. *validation-chosen* holds out a validation event, picks the best epoch "
        "by it and reads the test split once; *refit* then trains that many epochs on the validation events too. "
        "Published figures are of the reference protocol: trained on all but the test event, the best of all readings "
        "of the test split. *best* is our own recipe for a model of HSTU-large's size, beside which HSTU-large's "
        "published figures stand; *hstu_no_bias* is HSTU without its relative bias.",
        metrics=("hr@10", "ndcg@10", "hr@50", "hr@200"),
        contenders=("validation-chosen", "refit", "published"),
    ),
    "ranking": Topic(
        title="Ranking on MovieLens-1M",
        note="What a user does with a film that is shown (liked: 4 stars and more), split by time; the epoch is chosen "
        "on validation events, test events are read once. Means over the seeds (quartiles in brackets) of HSTU and "
        "DLRM, one seed of HSTU with one choice changed. Above 1 in a ratio means that HSTU is better; NE inverted.",
        headlines={
            "AUC of HSTU over DLRM:": ("ml1m", "like/auc, mean of 3 seeds", "hstu", "dlrm"),
            "NE of DLRM over HSTU:": ("ml1m", "like/ne, inverted, mean of 3 seeds", "hstu", "dlrm"),
        },
    ),
    "appendix_c": Topic(
        title="The paper's synthetic stream",
        note="Appendix C, Table 2: one pass in order over the first 90% of the stream, every event of held-out records "
        "of the last 10% predicted among all items. Means over the seeds (quartiles in brackets). Above 1 in a ratio "
        "means that the paper's order holds. The oracle knows the laws of the stream and all but the draws to come. "
        "Published figures are of the whole stream and models of unknown size.",
        headlines={
            "HR@10 of HSTU over the Transformer:": (
                "100,000 records of 128",
                "hr@10, mean of 3 seeds",
                "hstu",
                "transformer",
            ),
        },
    ),
    "scaling_law": Topic(
        title="Scaling laws",
        note="Loss on held-out records of the synthetic stream, in nats. The ladder of sizes and its law "
        "E + A (C / unit)^-beta, fitted to all but the largest run (brackets: quartiles over refits to resampled "
        "residuals); then the optima at equal compute. Gaps are the Transformer's law over HSTU's at equal compute, "
        "as fitted and at the nearer ends of their 90% intervals.",
        headlines={
            "limit of 3% over the error of HSTU's predicted largest run:": (
                "scaling",
                "held-out error",
                "limit of 3%",
                "scaling_hstu",
            ),
            "loss of the Transformer over HSTU's at 1e13 FLOPs:": (
                "scaling, 1e13 FLOPs",
                "loss",
                "scaling_sasrec",
                "scaling_hstu",
            ),
        },
    ),
    "attention_cpu": Topic(
        title="Attention on a CPU",
        note="fp32; a ratio above 1 means that the first contender is faster or smaller.",
        headlines={
            "training on 8,192 tokens, native over PyTorch's flash attention:": (
                "B2 H4 N8192 d64",
                "forward+backward rate",
                "native",
                "sdpa_padded",
            ),
            "ML-1M with relative bias, native over padded PyTorch:": (
                "B128 H1 lengths of ML-1M d50, position and time bias",
                "forward+backward rate",
                "native",
                "padded_eager",
            ),
        },
    ),
    "train_step": Topic(
        title="A training step of MovieLens-1M",
        note="Batch 128, fp32, time and memory against their limits, and the parts of the step.",
        headlines={
            "HSTU-large, 2 ranks, limit of 0.35 s over time:": ("HSTU-large, 2 x 1 threads", "step", "0.35 s", "step")
        },
    ),
    "encoder_cpu": Topic(
        title="Encoder against flash attention, on a CPU",
        note="Original sequences per second of HSTU layers over pre-norm Transformer layers of the same width and "
        "depth (D 512, 8 heads), fp32; torch's flash attention stands in for FlashAttention2, which has no "
        "CPU kernels. Full: every sequence has N tokens; ragged: a quarter of that in mean; SL: Stochastic "
        "Length keeps whole or cuts as its law says. A padded Transformer spends the same on each. "
        "Activations: of a Transformer layer over those of an HSTU layer.",
        headlines={
            "8,192 tokens, training: Stochastic Length 1.6 over a padded Transformer:": (
                "N 8192, training",
                "sequences/s",
                "HSTU, SL 1.6",
                "Transformer SDPA flash, padded",
            ),
            "ragged sequences over it:": (
                "N 8192, training",
                "sequences/s",
                "HSTU, ragged",
                "Transformer SDPA flash, padded",
            ),
        },
    ),
    "embedding": Topic(
        title="Embedding tables",
        note="One lookup with its backward and update, against `nn.Embedding` with a sparse gradient and the same "
        "optimizer by hand; above 1 means faster, or less memory than the limit. One rank exchanges nothing.",
        headlines={
            "90 million rows of 32 in fp16, limit of 1.3 x their state over peak memory:": (
                "90,000,000 rows x 32, 2 ranks",
                "peak memory",
                "1.3 x weights and state",
                "fp16",
            )
        },
    ),
    "data": Topic(
        title="Data",
        note="One process; a ratio above 1 means better than the limit. Sparsity: share of inputs left out of "
        "histories padded to the longest, log-normal before they are cut, with a median of 3,443 and a sigma of 1.8 "
        "that were fitted to the paper's four figures.",
        headlines={
            "whole histories to batches over 8 million events/s:": (
                "Zipf 1.2 histories up to 4,096, batches of 128, one process",
                "events/s",
                "whole histories",
                "8 million/s",
            )
        },
    ),
    "prepare": Topic(
        title="Preparing event logs",
        note="`python -m hstu_dist prepare data=events` as a process of its own, from Parquet to sequences, with "
        "DuckDB; peak memory is resident memory of that process. A ratio above 1 means better than the limit.",
        headlines={
            "100 million events, limit of 60 s over time:": (
                "100 million events of 4 million users, Zipf, memory_gib=3.8",
                "time",
                "60 s",
                "duckdb",
            )
        },
    ),
    "stream": Topic(
        title="Streams",
        note="Steady: files of a synthetic stream to training batches, read, checked, joined to histories and written "
        "down for restarts by one process. MovieLens-1M by weeks: each event is predicted among all items before it is "
        "trained on, once; means over all events. A ratio above 1 means better than the limit.",
        headlines={
            "MovieLens-1M by weeks, HR@10 of HSTU over popularity:": (
                "MovieLens-1M by weeks",
                "hr@10",
                "hstu",
                "popularity",
            )
        },
    ),
    "vocabulary": Topic(
        title="Vocabularies on a drifting stream",
        note="An eighth of the live items is replaced by new ids every window; each window is predicted before it is "
        "trained on, among the ids that live then, the same for all, ids of one row ordered at random. Means over the "
        "second half of the windows and the seeds (quartiles in brackets). Hashing has the rows that fit the bytes of "
        "zch with its ids; *all ids to come* has a row for every id, several times as many.",
        headlines={
            "HR@10 of ids, zch over hashing in the same bytes:": (
                "rows for 1.25 times the live ids",
                "hr@10, mean of 3 seeds",
                "zch, distance_lfu",
                "hash, same bytes",
            )
        },
    ),
    "vocabulary_step": Topic(
        title="A step with a growing vocabulary",
        note="Ids to rows, the rows that negatives are drawn from, lookup and update with row-wise Adagrad on "
        "one rank: a mean over 10 steps, one of which evicts. A ratio is speed over that with row numbers.",
        headlines={
            "a million rows, speed with zch over row numbers:": (
                "1,000,000 rows x 64, 12,800 Zipf ids, 1% of them new, 1 rank",
                "ids to rows, lookup and update",
                "zch, distance_lfu",
                "static",
            )
        },
    ),
    "inference": Topic(
        title="Scoring and serving",
        note="One process on all cores, fp32. Cold: the history is encoded with the candidates; cached: its keys and "
        "values are there. The arithmetic bound is the ratio of FLOPs. Memory: as the history and the candidates grow.",
        headlines={
            "1,024 candidates by M-FALCON over one by one:": (
                "history 4,096, 1,024 candidates, D 256, 4 layers, fp32",
                "candidates/s",
                "M-FALCON, cold",
                "one by one",
            ),
            "a cached history over a cold one:": (
                "history 4,096, 1,024 candidates, D 256, 4 layers, fp32",
                "repeated request",
                "M-FALCON, cached history",
                "M-FALCON, cold",
            ),
        },
    ),
    "checkpoint": Topic(
        title="Checkpoints",
        note="A ratio above 1, or above its target, means better than the limit.",
        headlines={
            "write rate over plain files:": ("1.00 GB on 2 ranks", "write rate", "synchronous", "plain files"),
            "read rate over them:": ("1.00 GB on 2 ranks", "read rate", "checkpoint", "plain files"),
        },
    ),
    "plan": Topic(
        title="Capacity planner",
        note="Time and memory of `python -m hstu_dist plan` itself, and what it predicts against what was measured: "
        "growth of the fullest rank's process (tables, optimizers, tower, gradients), and bytes that autograd saves.",
        headlines={
            "1.5 trillion parameters on 256 GPUs, limit of 10 s over time:": (
                "hstu_1p5t, 256 ranks",
                "time",
                "limit 10 s",
                "hstu_dist",
            ),
            "bytes of 4 ranks, predicted and measured:": (
                "resident, adamw, 4 ranks",
                "agreement of bytes",
                "smaller",
                "larger of predicted and measured",
            ),
        },
    ),
    "faults": Topic(
        title="Fault campaign",
        note="Real faults at random steps of small runs over gloo on one machine; recovered means that the run ended "
        "with every sequence trained on exactly once an epoch and with the metrics of a run that was left alone, "
        "within 0.02 where the number of ranks changed and 0.05 where a batch was left out, exactly otherwise.",
        headlines={
            "share of faults recovered from:": ("all", "recovered", "recovered", "faults"),
            "limit of 30 s over the slowest:": ("all", "seconds_to_recover", "30 s", "the slowest"),
        },
    ),
    "launch": Topic(
        title="Launch",
        note="Seconds from the command to the first step, two ranks, tiny model.",
        headlines={"limit of 2 s over what it adds to torchrun:": ("2 ranks, first step", "overhead", "2 s", "launch")},
    ),
    "kernels": Topic(
        title="Triton kernels compiled ahead of time",
        note="Without a GPU: what the compiler reports, not a speed.",
        headlines={
            "sm_90, share without spills and with tensor cores:": (
                "sm_90",
                "no spills, tensor cores used, within shared memory",
                "sound kernels",
                "kernels",
            )
        },
    ),
}
"""Shown first and in this order; other result files follow under their own names."""
