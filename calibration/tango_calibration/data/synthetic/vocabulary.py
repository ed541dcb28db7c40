"""Words for figures and places, and templates of questions."""

COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "medium", "large")
PLACES = (  # the cells of a 3×3 grid over the frame, row by row
    "at the top left",
    "at the top",
    "at the top right",
    "at the left",
    "in the center",
    "at the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
DIRECTIONS = ("left", "right", "up", "down")
NUMBERS = ("one", "two", "three", "four")
PATTERNS = ("plain", "shaded", "cloudy", "striped", "checkered", "cluttered")
TONES = ("gray", "brown", "dark", "slate")

# Pairs that only the test split has: does a model that knows green and knows crosses know a green cross?
HELD_OUT = (("green", "cross"), ("red", "ring"), ("blue", "star"), ("yellow", "triangle"), ("purple", "circle"))

REGIONS = ("top left", "top right", "bottom left", "bottom right", "center")
_PAIRS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

# Possible answers, by type of question.
ANSWERS: dict[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "count": NUMBERS,
    "where": REGIONS,
    "direction": DIRECTIONS,
    "first": _PAIRS,
    "appear": ("yes", "no"),
    "times": NUMBERS[:3],
    "larger": _PAIRS,
}
TYPES = tuple(ANSWERS)

# The trained checkpoint in models/tiny knows these texts, so their spelling stays.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "color": ("What colour is the {a}?", "Which colour does the {a} have?", "What is the colour of the {a}?"),
    "shape": ("What shape is the {a}?", "Which shape does the {a} have?", "What is the shape of the {a}?"),
    "count": ("How many {a} are there?", "How many {a} can be seen?", "What is the number of {a}?"),
    "where": ("Where is the {a}?", "In which part of the picture is the {a}?", "Where can the {a} be seen?"),
    "direction": ("Which way does the {a} move?", "In which direction does the {a} move?", "Where does the {a} go?"),
    "first": (
        "Which appears first, the {a} or the {b}?",
        "Which is seen first, the {a} or the {b}?",
        "Which comes first, the {a} or the {b}?",
    ),
    "appear": ("Does {a} appear?", "Is there {a} in the video?", "Can {a} be seen?"),
    "times": (
        "How many times does the {a} appear?",
        "How often does the {a} appear?",
        "How many times can the {a} be seen?",
    ),
    "larger": (
        "Which is larger, the {a} or the {b}?",
        "Which is bigger, the {a} or the {b}?",
        "Which has the larger size, the {a} or the {b}?",
    ),
}


def with_article(name: str) -> str:
    """The name, preceded by "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(shape: str) -> str:
    """The plural of a shape."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def corpus() -> list[str]:
    """Sentences with every word of phrases, questions and answers, with about their frequencies."""
    sizes = [*SIZES, ""]
    sentences = [
        f"{with_article(f'{sizes[i % 4]} {pair}'.strip())} {PLACES[i % 9]}" for i, pair in enumerate(_PAIRS * 3)
    ]
    sentences += [with_article(f"{word} object") for word in SIZES + COLORS]
    for asked, templates in QUESTIONS.items():
        for i, template in enumerate(templates * 8):
            sentences.append(template.format(a=_example(asked, i), b=_PAIRS[-1 - i]))
            sentences.append(ANSWERS[asked][i % len(ANSWERS[asked])])
    return sentences


def _example(asked: str, i: int) -> str:
    color, shape, size = COLORS[i // 3 % len(COLORS)], SHAPES[i // 3 % len(SHAPES)], SIZES[i % 3]
    return {
        "color": f"{size} {shape}",
        "shape": f"{size} {color} object",
        "count": plural(shape),
        "appear": with_article(f"{color} {shape}"),
    }.get(asked, f"{color} {shape}")
