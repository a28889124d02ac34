"""The word lists of the text families. Every word becomes one token of the embedded tokenizer."""

KEYS = tuple(
    "fox owl bear wolf deer hare frog toad crow dove hawk swan goose duck crab seal whale shark trout eel moth bee wasp"
    " ant snail slug mouse rat mole bat lynx puma llama camel horse mule goat sheep cow pig hen lark wren robin finch"
    " heron stork crane ibis kite gull tern auk puffin otter mink stoat badger boar elk moose bison yak zebra hippo"
    " rhino lion tiger panda koala lemur gibbon gecko newt viper cobra python turtle".split()
)
VALUES = tuple(
    "apple pear plum peach grape lemon lime mango melon fig date olive onion garlic leek carrot turnip radish beet kale"
    " bean pea corn rice wheat oat rye bread cake pie soup stew salt sugar honey milk cream butter cheese egg tea"
    " coffee cocoa wine juice nut almond walnut hazel mint basil thyme sage dill clove ginger pepper chili curry paste"
    " sauce jam jelly syrup toast bagel waffle pasta noodle tofu ham bacon steak sausage pickle".split()
)
NOUNS = tuple("river bridge tower village road hill lake forest castle garden market harbour".split())
VERBS = tuple("passes faces hides shadows follows borders".split())
ADJECTIVES = tuple("old quiet narrow bright empty green".split())
