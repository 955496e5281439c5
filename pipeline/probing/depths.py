"""What codes are named by: the module whose output they pool, or one of the names here."""

LAST = "last"  # the head's input, from which stage 1's head starts
SOURCE = "source"  # the head's output: the logits of the classes that the weights were made for
JOIN = "+"  # between depths whose codes stand side by side; no module's name holds it
