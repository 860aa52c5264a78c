"""The text that these tests train on."""

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer\n" for i in range(400))
