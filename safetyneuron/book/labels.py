"""How sets of neurons are called where they are drawn, in chapters 03 and 04 and in the panel."""

BROKEN = 0.8  # the safety mechanism counts as broken at this attack success rate
SMALL = 0.01  # shares of at most this are "fewer than one percent"
EQ3, SPECIFIC, RANDOM = "Eq 3", "Eq 3 without foundation", "random, matched to the second"
