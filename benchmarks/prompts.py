"""The prompts of the benchmarks: 10 to 60 words each, cut from one text for each expert. Equal calls, equal prompts."""

TEXTS = (
    "The patient asks whether the new medicine may be taken together with the old one. The doctor answers that both "
    "act on the same enzyme, so the dose has to be halved for two weeks and the blood tested again. If the headache "
    "returns, stop at once and call. Vaccines teach the body to recognise what it has not met yet, and a fever on the "
    "next day is a sign that it is learning.",
    "Write a function that reads a file line by line and returns the words that occur more than once, with their "
    "counts, in the order of the first occurrence. Use a dictionary, do not load the whole file, and raise an error "
    "when the encoding is wrong. Add a test for an empty file, one for a single word, and one for a word that is "
    "written in capital letters.",
    "A train leaves the station at nine and travels north at eighty kilometres per hour. Half an hour later a second "
    "train follows on the same track at one hundred kilometres per hour. When does it reach the first, and how far "
    "from the station are they then? Let x be the time in hours, write both distances as functions of x, set them "
    "equal and solve for x.",
    "The keeper of the lighthouse had not spoken to anyone since the autumn storms. Every evening he climbed the "
    "stairs, lit the lamp and looked for the ship that had promised to bring letters from his daughter. Tonight there "
    "was a light on the water where no light should be, and somebody was singing a song that only the two of them "
    "knew.",
)
SHORTEST, LONGEST = 10, 60


def prompts(expert: int, count: int) -> list[str]:
    """`count` prompts of growing length, each beginning at another word of the expert's text."""
    words = TEXTS[expert % len(TEXTS)].split()
    lengths = [SHORTEST + (LONGEST - SHORTEST) * number // max(count - 1, 1) for number in range(count)]
    return [
        " ".join(words[(7 * number + place) % len(words)] for place in range(length))
        for number, length in enumerate(lengths)
    ]
