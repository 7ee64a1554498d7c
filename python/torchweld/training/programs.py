"""The training programs by name."""

from __future__ import annotations

from torchweld.training.autoencoding import VAE
from torchweld.training.language_model import GPT2, GPT3
from torchweld.training.pretraining import BERT
from torchweld.training.program import Program
from torchweld.training.recognition import VIT
from torchweld.training.recommendation import RECOMMENDER
from torchweld.training.seq2seq import SEQ2SEQ
from torchweld.training.speech import SPEECH

_ALL: tuple[Program, ...] = (GPT2, GPT3, BERT, SEQ2SEQ, VAE, VIT, SPEECH, RECOMMENDER)
PROGRAMS: dict[str, Program] = {program.name: program for program in _ALL}
