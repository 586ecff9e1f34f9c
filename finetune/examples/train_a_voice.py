# %% [markdown]
# # A voice from start to end
#
# Cells for an editor that knows `# %%`, or one program: `python finetune/examples/train_a_voice.py`. It takes about
# 80 seconds on two cores, and leaves nothing behind.

# %%
import json
import tempfile
from pathlib import Path

from duet_moe import Writer, bundled
from duet_moe.finetune.prefer import prefer_voice
from duet_moe.finetune.style import train_voice
from duet_moe.finetune.voice_corpus import read_voice_corpus
from duet_moe.finetune.voices import VoiceStore

brand = Path(bundled("duet-mini")).parents[2] / "finetune" / "examples" / "zuzu"  # or a folder of your texts
scratch = tempfile.TemporaryDirectory()
store = VoiceStore(Path(scratch.name) / "voices")  # or VoiceStore(), in your data folder

# %% [markdown]
# ## What is in the corpus?

# %%
corpus = read_voice_corpus(brand / "train.jsonl", brand / "heldout.jsonl")
print("\n".join(corpus.report.lines()))
print(corpus.train[0].prompt, "->", corpus.train[0].response)

# %% [markdown]
# ## Train
#
# Interrupt the cell and run it again: it goes on. `replace=True` lets you run it twice.

# %%
folder = train_voice(
    brand / "train.jsonl", "zuzu", recipe="quick", store=store.root, heldout=brand / "heldout.jsonl",
    neutral=brand / "neutral.jsonl", author="Zuzu Ltd", licence="cc0-1.0", replace=True,
)  # fmt: skip
figures = store.card("zuzu").figures
print(f"held-out loss {figures['heldout_loss_before']:.2f} -> {figures['heldout_loss_after']:.2f}")
print(f"taken for zuzu {figures['style_share_before']:.0%} -> {figures['style_share_after']:.0%}")
for sample in figures["samples"][:3]:
    print(sample["prompt"], "\n  base:", sample["before"], "\n  zuzu:", sample["after"])

# %% [markdown]
# ## Write
#
# One voice per row; factual mode is the same with and without it.

# %%
writer = Writer.load("duet-mini", voice="zuzu", store=store.root)
for written in writer.write_batch(["Announce a new flavour."] * 2, "creative", 40, seed=1, voice=["zuzu", "base"]):
    print(written.voice or "base", ":", written.text)
question = "What is the capital of Portugal?"
print(writer.write(question, "factual").text, "==", writer.write(question, "factual", voice="base").text)

# %% [markdown]
# ## Teach it by preferences
#
# Pairs of answers, one of them chosen, as reviewers give them. Here the brand's texts are chosen over neutral ones.

# %%
neutral = [json.loads(line) for line in (brand / "neutral.jsonl").read_text(encoding="utf-8").splitlines()]
plain = {row["prompt"]: row["response"] for row in neutral}
pairs = [
    {"prompt": document.prompt, "chosen": document.response, "rejected": plain[document.prompt]}
    for document in corpus.train
    if document.prompt in plain
]
prefer_voice(pairs, "zuzu-taught", voice="zuzu", store=store.root, replace=True)
figures = store.card("zuzu-taught").figures
print(f"chosen answers likelier {figures['preferred_before']:.0%} -> {figures['preferred_after']:.0%}")

# %% [markdown]
# ## Pass it on
#
# An archive has the adapter, its card and the style score, and no text of the corpus.

# %%
archive = store.export("zuzu", Path(scratch.name) / "zuzu.zip")
print(f"{archive.name}: {archive.stat().st_size:,} bytes")
elsewhere = VoiceStore(Path(scratch.name) / "elsewhere")
print("imported as", elsewhere.import_(archive, "zuzu-two"))
scratch.cleanup()
