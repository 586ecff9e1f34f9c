"""How well a task router tells creative prompts from factual ones, beside a bag of words that learnt the same."""

from collections.abc import Mapping, Sequence

import numpy as np

from duet_moe.finetune.router_prompts import Prompt

BINS = 10
SMALLEST = 1e-30


def report(prompts: Sequence[Prompt], probabilities: np.ndarray, thresholds: tuple[float, float]) -> dict:
    """Return figures by test and by who answers: `router` and `bag_of_words`.

    Args:
        probabilities: that each prompt is creative, (prompts,).
        thresholds: below the first a prompt is factual, from the second on creative.

    Returns:
        `trained_on`, a number of prompts; `thresholds`; and `tests`, by test (prompts held out of the sources trained
        on, those that mislead apart; other sources; hard ones) and by who answers:
        `prompts`, `accuracy` at one half, `calibration_error`, `false_creative`, the share of factual prompts sent to
        creative, `false_factual`, and `hybrid`, the share that neither threshold decides.
    """
    control, control_thresholds = bag_of_words(prompts)
    tests = {}
    for name, picks in _tests(prompts).items():
        creative = np.array([prompts[index].creative for index in picks])
        tests[name] = {
            "prompts": len(picks),
            "router": _figures(probabilities[picks], creative, thresholds),
            "bag_of_words": _figures(control[picks], creative, control_thresholds),
        }
    trained = sum(prompt.part == "train" for prompt in prompts)
    return {"trained_on": trained, "thresholds": list(thresholds), "tests": tests}


def bag_of_words(prompts: Sequence[Prompt]) -> tuple[np.ndarray, tuple[float, float]]:
    """Return the probabilities of a logistic regression on words and word pairs, and thresholds chosen as ours are."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = [prompt.text for prompt in prompts]
    labels = np.array([prompt.creative for prompt in prompts])
    parts = np.array([prompt.part for prompt in prompts])
    train = np.flatnonzero(parts == "train")
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit([texts[index] for index in train])
    features = words.transform(texts)
    model = LogisticRegression(C=10, max_iter=500).fit(features[train], labels[train])
    probabilities = model.predict_proba(features)[:, 1]
    misleads = np.array([prompt.misleads for prompt in prompts])
    return probabilities, choose_thresholds(
        *(values[parts == "calibration"] for values in (probabilities, labels, misleads))
    )


def choose_thresholds(
    scores: np.ndarray,
    creative: np.ndarray,
    misleads: np.ndarray,
    false_creative: float = 0.005,
    false_factual: float = 0.02,
) -> tuple[float, float]:
    """Return the thresholds that keep both kinds of error this rare, among prompts that mislead and among the others.

    Args:
        scores: probabilities or log-odds that prompts are creative, (prompts,).
        creative, misleads (`np.ndarray` of bool): (prompts,).
        false_creative: share of factual prompts; half of the 1% that is allowed, since other prompts do worse.
        false_factual: share of creative prompts.
    """
    sorts = [misleads == kind for kind in (True, False) if (misleads == kind).any()]
    upper = [
        np.quantile(scores[sort & ~creative], 1 - false_creative, method="higher")
        for sort in sorts
        if (sort & ~creative).any()
    ]
    lower = [
        np.quantile(scores[sort & creative], false_factual, method="lower")
        for sort in sorts
        if (sort & creative).any()
    ]
    highest = float(max(upper))  # what equals it stays out; next to 0 lie numbers that some processors flush to it
    creative_from = max(float(np.nextafter(np.float32(highest), np.float32(np.inf))), highest + SMALLEST)
    return min(float(min(lower)), creative_from), creative_from


def calibration_error(probabilities: np.ndarray, creative: np.ndarray, bins: int = BINS) -> float:
    """Return the expected calibration error (Naeini et al. 2015): the mean gap, over bins of equal width weighted by
    their prompts, between the mean probability and the share that is creative."""
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    gaps = [
        (places == place).mean() * abs(probabilities[places == place].mean() - creative[places == place].mean())
        for place in np.unique(places)
    ]
    return float(sum(gaps))


def _tests(prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    tests = {
        "held out, ordinary": [p.part == "held_out" and not p.misleads for p in prompts],
        "held out, misleading": [p.part == "held_out" and p.misleads for p in prompts],
        "other sources": [p.part == "unseen" for p in prompts],
        "hard": [p.part == "hard" for p in prompts],
    }
    return {name: np.flatnonzero(mask) for name, mask in tests.items() if any(mask)}


def _figures(probabilities: np.ndarray, creative: np.ndarray, thresholds: tuple[float, float]) -> dict[str, float]:
    low, high = thresholds
    return {
        "accuracy": float(((probabilities >= 0.5) == creative).mean()),
        "calibration_error": calibration_error(probabilities, creative),
        "false_creative": _share(probabilities[~creative] >= high),
        "false_factual": _share(probabilities[creative] < low),
        "hybrid": float(((probabilities >= low) & (probabilities < high)).mean()),
    }


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else 0.0


def show(figures: Mapping) -> str:
    """Return the report as a markdown table."""
    names = ("accuracy", "calibration_error", "false_creative", "false_factual", "hybrid")
    lines = [
        "| prompts | | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---|---|" + "---:|" * len(names),
    ]
    for test, own in figures["tests"].items():
        for who in ("router", "bag_of_words"):
            cells = " | ".join(f"{own[who][name]:.3f}" for name in names)
            lines.append(f"| {test} ({own['prompts']}) | {who.replace('_', ' ')} | {cells} |")
    low, high = figures["thresholds"]
    return "\n".join([*lines, "", f"{figures['trained_on']} prompts trained on; thresholds {low:.3f} and {high:.3f}."])
