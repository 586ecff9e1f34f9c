"""Six prompts to start from, one per audience: three where the factual panel shines, three for the creative one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExamplePrompt:
    """A prompt and the reader it was written for.

    Example:
        >>> EXAMPLES[0].prompt
        'What is the capital of Portugal?'
    """

    prompt: str
    audience: str
    shows: str


EXAMPLES: tuple[ExamplePrompt, ...] = (
    ExamplePrompt("What is the capital of Portugal?", audience="pupil", shows="factual"),
    ExamplePrompt("What is the currency of Japan?", audience="traveller", shows="factual"),
    ExamplePrompt("What is the chemical symbol for gold?", audience="student", shows="factual"),
    ExamplePrompt("Write a tagline for a small bakery.", audience="marketer", shows="creative"),
    ExamplePrompt(
        "Write a short story about a cat who is afraid of the rain.", audience="story writer", shows="creative"
    ),
    ExamplePrompt(
        "Write a dialogue between a teacher and a late student.", audience="language teacher", shows="creative"
    ),
)
