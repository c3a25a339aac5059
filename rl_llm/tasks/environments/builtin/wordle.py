"""`--env=wordle`: find a word of five letters, told which letters are right."""

from __future__ import annotations

WORDS = tuple(
  """
  above actor adapt after agree alarm alert alive alone angle apple apron arena argue arise armor
  arrow aside avoid award badge baker basic basin beach beard begin bench berry birth black blade
  blank blaze blend bless blind block bloom board boast boost brain brave bread break brick bride
  brief bring broad broom brown brush build bunch cabin cable camel candy cargo carry catch cause
  chain chair chalk charm chase cheap check cheek chess chest chief child choir civil claim class
  clean clear climb clock cloth cloud coach coast coral couch count court cover crane crash cream
  creek crisp cross crowd crown curve dairy dance delay depth diary dough draft drain drama dream
  dress drift drink drive eager eagle early earth elbow empty enemy enjoy enter equal event exact
  extra fable faith false fancy feast fence fever field fight final flame flash fleet float flood
  floor flour focus force frame fresh front frost fruit giant given glass globe glove grace grade
  grain grand grape grass great green greet group guard guess guest guide habit happy heart heavy
  hello honey honor horse hotel house human humor ideal image index inner issue jelly jewel joint
  judge juice knife knock label labor large laugh layer learn lemon level light limit linen local
  logic loose lucky lunch magic major maple march match maybe medal melon metal meter minor mixed
  model money month moral motor mount mouse mouth movie music nerve never night noble noise north
  novel nurse ocean offer often olive onion orbit order organ other outer owner paint panel paper
  party pasta patch peace pearl phase phone photo piano piece pilot pitch place plain plane plant
  plate point polar pound power press price pride prime print prize proof proud pulse queen quick
  quiet quilt radio raise ranch range rapid reach ready relax reply rider ridge right rival river
  robot rough round route royal rural salad sauce scale scarf scene scent scope score scout shade
  shake shape share sharp sheep sheet shelf shell shift shine shirt shock shore short shout sight
  skill sleep slice slide smart smile smoke snack solid sound south space spare spark speak speed
  spice spoon sport staff stage stair stamp stand start state steam steel steep stick stone store
  storm story stove straw strip study style sugar sunny sweet swing table taste teach thank theme
  thick thing think tiger title toast token topic torch total touch tower trace track trade trail
  train treat trend trial tribe trick truck trust truth twist uncle under union unite upper urban
  usual value video visit vital voice wagon waist waste watch water wheat wheel where white whole
  width woman world worry worth wound wrist write yield young youth zebra
  """.split()
)


class Wordle:
  """A secret word and six tries."""

  def reset(self, word: str, tries: int = 6, **columns) -> str | None:
    self._word = word.lower()
    self.left, self.guesses, self.found, self.done = int(tries), [], False, False
    return f"You have {self.left} tries."

  def guess(self, word: str) -> str:
    """Tries a word. Each letter is answered by G (right), Y (in another place) or - (not in it).

    Args:
      word: Five letters.
    """
    word = word.strip().lower()
    if self.done:
      raise ValueError("the game is over")
    if len(word) != len(self._word) or not (word.isascii() and word.isalpha()):
      raise ValueError(f"{word[:20]!r} is no word of {len(self._word)} letters")
    self.guesses.append(word)
    self.left -= 1
    self.found = word == self._word
    self.done = self.found or not self.left
    return f"{marks(word, self._word)}, {self.left} left"

  def get_reward(self) -> float:
    """1 for the word; else half of the share of letters that were right in the best guess."""
    if self.found:
      return 1.0
    right = [sum(map(str.__eq__, guess, self._word)) for guess in self.guesses]
    return max(right, default=0) / len(self._word) / 2


def marks(guess: str, word: str) -> str:
  """G, Y or - for each letter; a letter is marked as often as the word has it.

  >>> marks("sleep", "speed")
  'G-GGY'
  """
  left = [b for a, b in zip(guess, word, strict=True) if a != b]
  found = ""
  for a, b in zip(guess, word, strict=True):
    mark = "G" if a == b else "Y" if a in left else "-"
    if mark == "Y":
      left.remove(a)
    found += mark
  return found
