"""How sets of neurons, and languages, are called where they are drawn."""

BROKEN = 0.8  # the safety mechanism counts as broken at this attack success rate
SMALL = 0.01  # shares of at most this are "fewer than one percent"
EQ3, SPECIFIC, RANDOM = "Eq 3", "Eq 3 without foundation", "random, matched to the second"
LANGUAGE_NAMES = {
    "en": "English",
    "it": "Italian",
    "zh": "Chinese",
    "th": "Thai",
    "vi": "Vietnamese",
}
