"""How measured figures are called and shown, on every page."""

from __future__ import annotations

from taid_vlm.report.data import Column

FIGURES = (
    Column("kl", "KL(teacher ‖ student)", "lower", ".4f", "nats/token",
           "How far the student's next-token law is from the teacher's."),
    Column("reverse_kl", "KL(student ‖ teacher)", "lower", ".4f", "nats/token"),
    Column("jsd", "JSD", "lower", ".4f", "nats/token",
           "Jensen-Shannon divergence, the mean KL of both from their middle; at most log 2."),
    Column("agreement", "agreement", "higher", ".3f", "",
           "Share of tokens where both models' most likely token is the same."),
    Column("nll", "NLL of the data", "lower", ".4f", "nats/token"),
    Column("token_accuracy", "token accuracy", "higher", ".3f", "",
           "Share of the data's tokens that are the student's most likely ones."),
    Column("ece", "calibration error", "lower", ".4f", "",
           "How far the student's confidence in its most likely token is from its accuracy: mean "
           "distance over 15 bins of confidence, weighted by their tokens (ECE)."),
    Column("student_entropy", "entropy", "", ".3f", "nats"),
)
# so many as fit beside each other on a screen
AGAINST = tuple(c for c in FIGURES if c.key in ("kl", "reverse_kl", "jsd", "agreement"))
ALONE = tuple(c for c in FIGURES if c not in AGAINST)
MASSES = (
    Column("head_mass", "head", "", ".4f", "",
           "The student's probability on the teacher's 10 most likely tokens."),
    Column("tail_mass", "tail", "", ".2e", "",
           "The student's probability on the fifth of all tokens that the teacher ranks last."),
    Column("teacher_head_mass", "teacher's head", "", ".4f", "",
           "What the teacher itself puts there."),
    Column("teacher_tail_mass", "teacher's tail", "", ".2e", ""),
)
LOOKS = (
    Column("kl_blank", "KL(real ‖ blank image)", "", ".4f", "nats/token",
           "How far a model's answers are from those with a grey image; 0: it does not look."),
    Column("kl_shuffled", "KL(real ‖ another's image)", "", ".4f", "nats/token",
           "The same against the image of another record."),
    Column("kl_frozen", "KL(real ‖ frozen video)", "", ".4f", "nats/token",
           "The same against a video that stands still; 0: one frame is all it looks at."),
    Column("gain_blank", "gain over blank", "", ".4f", "nats/token",
           "Log-likelihood of the reference answer that the real image adds."),
    Column("gain_shuffled", "gain over another's", "", ".4f", "nats/token"),
    Column("gain_frozen", "gain over a frozen video", "", ".4f", "nats/token"),
)
CHUNKS = Column("chunk_kl", "KL of chunks", "lower", ".4f", "nats/chunk",
                "KL(teacher ‖ student) of the likelihoods of pieces of text that the two "
                "tokenizers split differently.")
