"""The word lists of the text families. Every word becomes one token of the embedded tokenizer."""

KEYS = tuple(
    "fox owl bear wolf deer hare frog toad crow dove hawk swan goose duck crab seal whale shark trout eel moth bee wasp"
    " ant snail slug mouse rat mole bat lynx puma".split()
)
VALUES = tuple(
    "apple pear plum peach grape lemon lime mango melon fig date olive onion garlic leek carrot turnip radish beet kale"
    " bean pea corn rice wheat oat rye bread cake pie soup stew".split()
)
NOUNS = tuple("river bridge tower village road hill lake forest castle garden market harbour".split())
VERBS = tuple("passes faces hides shadows follows borders".split())
ADJECTIVES = tuple("old quiet narrow bright empty green".split())
