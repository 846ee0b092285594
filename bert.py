"""BERT: one network, pre-trained to fill in hidden words, fine-tuned for a task with few labels.

Paper    BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding -- Jacob
         Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova, 2018, arXiv:1810.04805v2 of 2019
Idea     A language model reads from left to right: a word never knows what follows it. BERT hides
         some words and predicts them from both sides; it also tells whether two sentences belong
         together. Neither needs labels. The same weights then learn a task with one new layer.
Figure   (Figures 1 and 2)

         [CLS] for [MASK] in range [SEP] ( 10 ) : [SEP]        segment 0 0 0 0 0 0, 1 1 1 1 1
             token + segment + position, LayerNorm (B, T, dim)
             self-attention to both sides, add, LayerNorm  | one of L
             feed-forward with GELU, add, LayerNorm        | equal layers
         x_0       ...     x_2       ...    x_(T-1) (B, T, dim)
          |                 +-- predictions: " i" .6, " x" .1, ..        pre-training, task 1
          +-- pooler, c (B, dim) --+-- next sentence, or a random one?   pre-training, task 2
                                   +-- classifier                        fine-tuning
Symbols  here | in the paper | what. In shapes: B sequences, T tokens, V words in the vocabulary
         dim | H | width of x (768)          layers, heads | L, A | (12, 12)
         d_k | - | dim / A, per head (64)    mask | - | (B, T), False on padding
         x | C, T_i | last outputs (B, T, dim): C = x_0 at [CLS], T_i = x_i
         c | - | the pooler's output, tanh(W x_0 + b) (B, dim)
         ids, segments | - | (B, T); segments: 0 in the first sentence, 1 in the second
         E | - | the token table (V, dim); the paper's E is the input, the sum of section 2
Differs  As the official code, but for the exact GELU: a pooler on C, a dense layer before the
         word scores, tied embeddings; the paper mentions none of them. Words are hidden anew at
         each reading, each with 15 %. The demo is small, to end in minutes: dim 64, 2 layers, 4
         heads of 16 (768, 12, 12 of 64), 128 tokens (up to 512), 2,048 tokens of its own in the
         vocabulary (30,000 WordPiece), no padding, 1,500 steps of 16 pairs (1,000,000 of 256),
         rates of about 3e-3 (1e-4; fine-tuning 2e-5 to 5e-5), warm-up over 1/11 of the steps
         (1/100), in pre-training beta2 .98 (.999), AdamW's decay on all weights (official: not on
         biases and LayerNorm), first weights from N(0, .06^2). A "sentence" is always 64 tokens
         (of any length).
Run      python bert.py                     # pre-trains and fine-tunes; some 3 minutes on 2 cores
         python bert.py --save b.pt         # then --load b.pt --steps 1500 fine-tunes again
Expect   20 labels a class, test files, seeds 2 and 4 (of five planned): pre-trained .344 and
         .303, from scratch .188 and .198, bag of bytes .690 and .691, chance .100. Pre-training
         pays, as in the paper, but no network comes near the bag of bytes; 1,500 steps are too
         few for task 1: most guesses are common tokens. Paper: GLUE 79.6, GPT 75.1.
"""

import argparse
import copy
import os
import pathlib
import re
from collections import Counter, defaultdict
from contextlib import suppress
from signal import SIGINT, default_int_handler, signal

import torch
from torch import manual_seed, nn, no_grad, randint, randperm, stack, where
from torch.nn import Dropout, Embedding, LayerNorm, Linear, Module, ModuleDict, ModuleList
from torch.nn.functional import cross_entropy, gelu, pad

# ================================ PART ONE: THE PAPER =================================

# ---- 1. Why words are hidden (Section 1 and 3.1) ----
#
# A network that has read much text knows much about language before it sees its first label. How
# should it be made to read? A language model predicts each word from the words before it. This is
# a task without end, and it needs no labels. But it has to look to the left only: at "the bank of
# the", the meaning of "bank" comes one word too late. For a task such as "does this sentence
# answer that question?" all the words are there, and a network should use both sides of each.
#
# So why not let it look to both sides, and predict every word? Because then each word can see
# itself. In one layer this can be forbidden: position t does not look at word t. In two it can't:
#
#     layer 2      t - 1      t          position t does not look at word t; but it looks at
#                        /                 position t - 1 of layer 1,
#     layer 1      t - 1      t          and this one has looked at word t.
#                        \
#     words        t - 1      t
#
# So position t sees word t after all, by way of position t - 1. (The residual path of a layer,
# see section 4, would carry word t to position t as well.)
#
# The network would learn to copy, and nothing else. BERT's way out: take the word away before the
# network sees it. A few words of the input are replaced by [MASK], and only these have to be
# predicted, from everything that is left on both sides. (Taylor's cloze test of 1953.)
#
# The price: a language model learns from each word, BERT from 15 in 100. It converges a little
# more slowly, but is more accurate almost at once (Appendix C.1).


IGNORE = -100  # the label of a position that is not to be predicted, as in cross_entropy


def mask_tokens(ids, is_word, vocab_size, mask_id):
    """Masked language model (Section 3.1, Appendix A.1): ids (B, T) -> hidden, labels (B, T).

    is_word (B, T): False at [CLS], [SEP] and [PAD], which are never chosen. labels holds the true
    id where a token was chosen, and IGNORE elsewhere.
    """
    # Each token is chosen with probability 15 %. What the network sees in its place:
    #
    #   80 %  [MASK]           The word has to be found from its surroundings. If it were always
    #                          [MASK], task 1 would train only outputs at [MASK]. Fine-tuning has
    #                          no [MASK]: tasks on words read the outputs at real words, and [CLS]
    #                          looks at them.
    #   10 %  a random word    A word that is there may be wrong, so it must be held against its
    #                          surroundings, too. Without this case, every word that is not [MASK]
    #                          would be right, and copying it would be the best answer.
    #   10 %  the word itself  A word that is there may be right. Without this case, every visible
    #                          word that is judged would be wrong, and the network would learn
    #                          to disbelieve what it reads.
    #
    # Where a visible word is judged, it is right as often as it is random: 1.5 against 1.5 in
    # 100. At a visible word the network can't tell whether it will be judged, or whether the word
    # is true. So it has to keep, at every position, its word and what the other words say about
    # it. That is what makes its outputs useful later. In the paper's measurements the mix matters
    # little once the network is fine-tuned (Appendix C.2): it is a safeguard.
    #
    # An example of 8 words (the demo's tokens are a little different), of which dice[0] has
    # chosen 2, 5 and 7. dice[1] decides what is shown there:
    #
    #     text     for    i      in     range  (      10     )      :
    #     dice[1]         .31                  .85           .97
    #     input    for    [MASK] in     range  while  10     )      :
    #     labels   -100   i      -100   -100   (      -100   )      -100
    #
    # The dice are thrown anew each time a text is read, so no two readings are the same, and a
    # small text lasts longer. (The official code makes ten readings of each text beforehand.)
    dice = torch.rand(2, *ids.shape, device=ids.device)  # (2, B, T): which; what is shown
    chosen = is_word & (dice[0] < 0.15)
    labels = ids.masked_fill(~chosen, IGNORE)
    random_word = torch.randint_like(ids, vocab_size)  # of all V, [CLS] and so on included
    # The second line overwrites a part of what the first has written: below .9, then below .8.
    hidden = where(chosen & (dice[1] < 0.9), random_word, ids)
    hidden = hidden.masked_fill(chosen & (dice[1] < 0.8), mask_id)
    return hidden, labels


# ---- 2. The input (Section 3, Figure 2) ----
#
# One network is to take single sentences and pairs of them (question and paragraph, premise and
# hypothesis) without being changed. So a pair is written as one sequence, with two special
# tokens: [SEP] ends each sentence, [CLS] stands in front. [CLS] is no word, so its last output is
# free to gather what concerns the whole: this is what classifiers read.
#
# Each token's input is the sum of three learned vectors:
#
#     token        [CLS]   a     b   [SEP]   c     d   [SEP]         what it is
#     + segment      0     0     0     0     1     1     1           which sentence it is in
#     + position     0     1     2     3     4     5     6           where it stands
#
# Without positions, the network could not tell "a b" from "b a": attention (3) takes a weighted
# sum, and a sum has no order. Without segments the two sentences could still be told apart, but
# only by finding where [SEP] is. Learned positions end where their table ends: 512 tokens, and a
# longer text has to be cut.
#
# A sum, and not a long vector of three parts? A matrix that is applied to the sum can still pick
# the parts out again, as long as they lie in different directions, and 768 dimensions have room
# for many. The sum is then normalised, x of each token by itself:
#
#     LayerNorm(x)  =  gamma (x - mean(x)) / sqrt(var(x) + eps)  +  beta
#
# so that every token enters the first layer at the same scale. mean and var are over x's dim
# numbers; gamma and beta (dim) are learned; eps avoids 0 / 0.


class Embeddings(Module):
    """ids and segments (B, T) -> x (B, T, dim)."""

    def __init__(self, vocab_size, dim, positions):
        super().__init__()
        self.word_embeddings = Embedding(vocab_size, dim)
        self.position_embeddings = Embedding(positions, dim)
        self.token_type_embeddings = Embedding(2, dim)
        self.LayerNorm = LayerNorm(dim, 1e-12)  # official; torch's own is 1e-5
        self.dropout = Dropout(0.1)

    def forward(self, ids, segments):
        x = self.word_embeddings(ids) + self.token_type_embeddings(segments)  # (B, T, dim)
        x = x + self.position_embeddings.weight[: ids.shape[1]]  # (T, dim), for each sequence
        return self.dropout(self.LayerNorm(x))


# ---- 3. Self-attention, to both sides (Section 3; Vaswani et al., Section 3.2) ----
#
# Each token asks all others for what it needs. It sends out a query q, every token shows a key k
# and holds a value v, and the token gets the mean of the values, weighted by how well query and
# key agree:
#
#     Attention(Q, K, V)  =  softmax(Q K^T / sqrt(d_k)) V
#
# Here Q, K and V are matrices (T, d_k), a token in each row; this V isn't the size of the
# vocabulary. "it" may ask for a noun, and a noun may hand over which noun it is. One mean can not
# serve two questions at once. So A heads, each with d_k = dim / A numbers, do this side by side;
# a linear layer (in AddNorm) mixes them.
#
# Why the square root? Say the numbers in q and k are independent, with mean 0 and variance 1.
# Each product q_i k_i has variance 1, and their sum has variance d_k. With d_k = 64 the scores
# would spread by 8 around 0. e^8 is 3,000, so one key takes nearly all the weight by chance, and
# the gradient of the softmax, p (1 - p), where p is a weight, is nearly 0. Divided by sqrt(64),
# the scores spread by 1.
#
# GPT's causal mask (position t looks only at 0 .. t) is missing: this is the "bidirectional" of
# the title, and all that sets these layers apart from those of the first GPT. One mask is needed,
# though. Sequences of a batch differ in length and are filled up with [PAD]; nobody may look at
# these. Otherwise what a sentence means would depend on how long the other sentences of its batch
# are. (The demo's rows are all 131 tokens long: there mask stays None, and `Bert.loss` takes
# none. Padded batches need one.)


class SelfAttention(Module):
    """x (B, T, dim), mask (B, T) or None: True on tokens, False on padding -> (B, T, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = Linear(dim, dim)  # all heads in one matrix
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.dropout = Dropout(0.1)

    def forward(self, x, mask):
        q, k, v = [
            # Unflattened into heads first. A plain view as (B, A, T, d_k) would mix the tokens.
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, A, T, d_k)
            for linear in (self.query, self.key, self.value)
        ]
        scores = q @ k.mT / q.shape[3] ** 0.5  # (B, A, T, T)  row: asks, column: is asked
        if mask is not None:
            # The lowest finite number, not -inf: if a sequence were all padding, the softmax
            # would be NaN, and one NaN in the loss is enough to ruin every weight.
            least = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~mask[:, None, None], least)
        weights = self.dropout(scores.softmax(3))  # (B, A, T, T): rows sum to 1 before dropout
        return (weights @ v).transpose(1, 2).flatten(2)  # (B, T, dim): the heads side by side


# ---- 4. A layer (Section 3; Vaswani et al., Sections 3.1 and 3.3) ----
#
# Attention moves content between the tokens; a network of two linear layers then works on each
# token by itself. Around each of the two runs a residual path:
#
#     x  ->  LayerNorm(x + dropout(Linear(attention(x))))
#     x  ->  LayerNorm(x + dropout(Linear(GELU(Linear(x)))))
#
# The sum lets a layer change x a little instead of making it anew, and gives the gradient a way
# past the sublayer. The norm stands after the sum (post-norm). Nothing can grow from layer to
# layer, then, but the gradient has to pass through every norm on its way down. At full rate from
# the first step this fails easily, so post-norm networks need a warm-up: the rate rises from 0.
# (GPT-2 and most later networks have the norm inside, before the sublayer.)
#
#     GELU(x)  =  x P(X <= x)  =  x (1 + erf(x / sqrt(2))) / 2        with X ~ N(0, 1)
#
# It is x for large x and 0 for very negative x, like ReLU, with a smooth bend between, so there
# is some gradient on both sides of 0. There is a cheaper form with tanh. (GPT-2 and today's
# official BERT code use it; here it is the exact one.) The two differ by up to 5e-4, so weights
# that were trained with one should run with the same.


class AddNorm(Module):
    """LayerNorm(x + dropout(Linear(y))): y (B, T, width), x (B, T, dim) -> (B, T, dim)."""

    def __init__(self, width, dim):
        super().__init__()
        self.dense = Linear(width, dim)
        self.LayerNorm = LayerNorm(dim, 1e-12)
        self.dropout = Dropout(0.1)

    def forward(self, y, x):
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class Layer(Module):
    """x (B, T, dim) -> (B, T, dim)."""

    def __init__(self, dim, heads):
        super().__init__()
        # The nested names are the official ones: `layer.0.attention.output.dense.weight`. What a
        # ModuleDict holds can be read as an attribute, too: `attention.output`.
        self.attention = ModuleDict(
            {"self": SelfAttention(dim, heads), "output": AddNorm(dim, dim)}
        )
        self.intermediate = ModuleDict({"dense": Linear(dim, 4 * dim)})
        self.output = AddNorm(4 * dim, dim)

    def forward(self, x, mask):
        x = self.attention.output(self.attention.self(x, mask), x)
        y = gelu(self.intermediate.dense(x))  # (B, T, 4 dim)
        return self.output(y, x)


# ---- 5. The encoder and its pooler (Section 3) ----
#
# The defaults are BERT-base: 23.8 million numbers in the embeddings, 12 layers of 7.1 million,
# and a pooler of .6 million, 109,482,240 in all.
#
# The pooler is one more layer on the last output of [CLS]: c = tanh(W x_0 + b). The paper calls
# the output itself C and doesn't mention this layer; the official code has it. Until fine-tuning,
# the pooler's W and b are trained by the next-sentence task alone, so c is no good sentence
# vector by itself: similar sentences needn't have similar c. (Section 3.1 says so, too; comparing
# them is a common mistake.)


class Encoder(Module):
    """ids (B, T) -> x (B, T, dim), c (B, dim). Defaults: BERT-base; large: 1024, 24, 16."""

    def __init__(self, vocab_size=30522, dim=768, layers=12, heads=12, positions=512):
        super().__init__()
        self.embeddings = Embeddings(vocab_size, dim, positions)
        self.encoder = ModuleDict({"layer": ModuleList(Layer(dim, heads) for _ in range(layers))})
        self.pooler = ModuleDict({"dense": Linear(dim, dim)})
        self.apply(initialise)

    def forward(self, ids, segments, mask=None):
        """segments (B, T): 0 or 1. mask (B, T): False on padding; None where there is none."""
        x = self.embeddings(ids, segments)  # (B, T, dim)
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler.dense(x[:, 0]))


def initialise(module):
    """Weights from N(0, .02^2), biases 0: `model.apply(initialise)`."""
    # torch's own nn.Embedding draws from N(0, 1). As the embeddings are also the last layer, the
    # first logits would be 50 times as large, and the first loss far above ln V.
    if isinstance(module, Linear | Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, Linear):
        nn.init.zeros_(module.bias)


# ---- 6. The two tasks of pre-training (Section 3.1, Appendix A.1 and A.2) ----
#
# Task 1, the masked language model. At each chosen position the network names the word:
#
#     p(word | text) = softmax(E LayerNorm(GELU(W x + b)) + bias)
#     L_MLM          = mean over the chosen positions of  -ln p(the word that was there)
#
# Only the chosen positions count: at the others the word is in the input, and naming it would be
# copying.
#
# E (V, dim) is the table of the word embeddings once more (tied): a word's score is the dot
# product of its own vector with what the network expects. In BERT-base this saves 23 million
# numbers, and every step trains the vectors of all words, also of those that the batch doesn't
# hold. At the start all words are nearly alike, and the loss is a little above ln V = 10.3 for
# 30,522 words.
#
# Task 2, next sentence. Question answering and inference ask how two sentences relate, and single
# words don't teach that. So half of the pairs are two neighbours from a text (label 0), and in
# the other half the second sentence comes from a random place (label 1). c has to say which:
#
#     L_NSP  =  mean over the pairs of  -ln softmax(W c + b)[label]             at the start: ln 2
#
# The loss is the sum L_MLM + L_NSP. The second one is the easier task, and mostly a question of
# topic: a random sentence seldom speaks of the same thing. Without it the paper loses on some
# tasks with pairs (QNLI 88.4 to 84.9, Section 5.1); later work (RoBERTa) left it out and lost
# nothing. But where a classifier reads c, as here, this task alone has trained the pooler.


class Predictions(Module):
    """The head of the masked language model: x (.., dim) -> logits (.., V)."""

    def __init__(self, embedding):
        super().__init__()
        vocab_size, dim = embedding.shape
        dense = Linear(dim, dim)
        self.transform = ModuleDict({"dense": dense, "LayerNorm": LayerNorm(dim, 1e-12)})
        self.decoder = Linear(dim, vocab_size)
        self.decoder.weight = embedding  # tied: one parameter with two names
        self.bias = self.decoder.bias  # so is this one, in the official files

    def forward(self, x):
        return self.decoder(self.transform.LayerNorm(gelu(self.transform.dense(x))))


class Bert(Module):
    """An Encoder with both heads, 110,106,428 parameters at BERT-base's sizes; official names."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert
        words = bert.embeddings.word_embeddings.weight  # (V, dim)
        self.cls = ModuleDict(
            {"predictions": Predictions(words), "seq_relationship": Linear(words.shape[1], 2)}
        )
        self.cls.apply(initialise)

    def forward(self, ids, segments, mask=None, chosen=...):  # x[...] is all of x
        """-> scores of the words (B, T, V), of next and random (B, 2).

        chosen (B, T): True where the words are to be scored (default: everywhere) -> (chosen, V).
        """
        x, c = self.bert(ids, segments, mask)
        return self.cls.predictions(x[chosen]), self.cls.seq_relationship(c)

    def loss(self, ids, segments, labels, is_random):
        """ids, labels of mask_tokens; is_random (B,): 0 or 1 -> L_MLM + L_NSP ()."""
        # L_MLM at the chosen positions only. With the others in, most of the task would be to
        # copy a word that is there. The head runs on these alone: a seventh of its work.
        chosen = labels != IGNORE
        words, pair = self(ids, segments, chosen=chosen)
        return cross_entropy(words, labels[chosen]) + cross_entropy(pair, is_random)

    @classmethod
    def from_checkpoint(cls, path):
        """Builds the model with the sizes that the file shows, and loads it. (The demo doesn't.)

        path: a state dict with the names of Hugging Face's BertForPreTraining. A head of
        attention has 64 dimensions, as in all official models. A weight that is missing, or one
        too many, is an error.
        """
        weights = {}
        for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
            # The first release has other names in LayerNorm; DataParallel and torch.compile add
            # prefixes.
            name = name.replace("gamma", "weight").replace("beta", "bias")
            weights[re.sub(r"module\.|_orig_mod\.", "", name)] = value
        words = weights["bert.embeddings.word_embeddings.weight"]
        positions = len(weights["bert.embeddings.position_embeddings.weight"])
        layers = sum(name.endswith("intermediate.dense.bias") for name in weights)
        dim = words.shape[1]
        model = cls(Encoder(len(words), dim, layers, dim // 64, positions))
        weights.pop("bert.embeddings.position_ids", None)  # 0, 1, 2, ..: a constant
        weights["cls.predictions.decoder.weight"] = words  # tied; not all files hold them twice
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
        model.load_state_dict(weights)
        return model


# ---- 7. Fine-tuning (Section 3.2, Appendix A.3) ----
#
# Where the labels are few, the network must not start from nothing. It keeps all its weights,
# gets one new layer for the task, W of (classes, dim), and all weights are trained further, end
# to end:
#
#     p(class | text)  =  softmax(W c + b)
#
# in the paper with a smaller rate than pre-training (2e-5 to 5e-5, 2 to 4 passes over the
# labels): W is random at first, and at a large rate its gradients can wipe out what the network
# knows. In the demo 3e-3 was the best of the few rates that were tried on validation files,
# perhaps because its network is small and its 100 steps are few.


class Classifier(Module):
    """An encoder, pre-trained or not, and a new layer on c: ids (B, T) -> logits (B, classes)."""

    def __init__(self, bert, classes):
        super().__init__()
        self.bert = bert
        self.dropout = Dropout(0.1)
        self.classifier = Linear(bert.pooler.dense.out_features, classes)
        initialise(self.classifier)

    def forward(self, ids, segments, mask=None):
        _, c = self.bert(ids, segments, mask)
        return self.classifier(self.dropout(c))


# ================================= PART TWO: THE DEMO =================================

# ---- 8. Data ----
#
# Python's own standard library is a text that every reader of this file has. Ten of its packages,
# with topics and habits of their own, give a task with labels: from which of the ten does this
# window of 128 tokens (some eight lines) come?
#
# Files are divided, not windows. Two windows of one file share names and phrases: with one of
# them in training, the other would be no test. Pre-training reads only the training files, half
# of all, and is never told from which package a window comes.

PACKAGES = (
    "asyncio ctypes email encodings http importlib logging multiprocessing unittest xml".split()
)
COUNTS = (5, 20, 100)  # labels a class
WINDOW = 128  # tokens of text; with [CLS] and two [SEP] a row has T = 131 (paper: up to 512)
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP, MASK = 1, 2, 3


def load_data(device, size=2048):
    """-> vocabulary, windows to pre-train on (N, 2, 64), {split: windows (10, n, 2, 64)}."""
    root = pathlib.Path(os.__file__).parent
    texts = defaultdict(list)
    for package in PACKAGES:
        files = sorted((root / package).rglob("*.py"))
        for i, file in enumerate(sorted(files, key=os.path.getsize)):
            # In turn, by their sizes: two of four for training, one held out for the test. The
            # fourth, validation, is not used here: settings were chosen on it earlier.
            split = ("train", "validation", "test", "train")[i % 4]
            # A token is a word, a run of signs, one digit, a line end, or one other blank. A word
            # takes the space before it along, and a line end the indent behind it. (Latin-1: a
            # character for each byte.)
            token = r" ?[A-Za-z]+|\n *|[^A-Za-z0-9\s]+|[\s\S]"
            texts[split, package] += re.findall(token, file.read_text("latin-1"))

    train = [piece for package in PACKAGES for piece in texts["train", package]]
    common = [piece for piece, _ in Counter(train).most_common() if len(piece) > 1]
    vocabulary = (SPECIAL + list(map(chr, range(256))) + common)[:size]
    number = {piece: i for i, piece in enumerate(vocabulary)}

    def windows(text):
        ids = []
        for piece in text:  # one that is not in the vocabulary is spelled
            ids += [number[piece]] if piece in number else map(number.get, piece)
        x = torch.tensor(ids).to(device)
        # A window starts every 64 tokens, so each half is once first and once second. Some
        # windows cross the end of a file, and then their "next" half is not really next.
        return x.unfold(0, WINDOW, WINDOW // 2).unflatten(1, (2, -1))  # (n, 2, 64)

    data = {}
    manual_seed(0)  # all seeds are judged by the same windows
    for split, n in (("train", 200), ("test", 100)):
        x = [windows(texts[split, package]) for package in PACKAGES]
        data[split] = stack([rows[randperm(len(rows))[:n]] for rows in x])
    return vocabulary, windows(train), data


def pack(x):
    """Windows (n, 2, 64) -> ids [CLS] half [SEP] other half [SEP] and segments, both (n, T)."""
    # Labelled windows, too, are packed as in pre-training, so that [CLS] and the pooler meet what
    # they know.
    ids = pad(x, (0, 1), value=SEP).flatten(1)  # (n, T - 1)
    ids = pad(ids, (1, 0), value=CLS)
    ends = (ids == SEP).long()
    return ids, ends.cumsum(1) - ends  # how many halves have ended before the token: 0 or 1


def pairs(x, vocabulary):
    """Windows (n, 2, 64), half of them torn apart, words hidden -> the inputs of Bert.loss."""
    is_random = randint(2, (len(x),), device=x.device)
    a, b = x.unbind(1)
    # The second half of another window (paper: any random sentence of the corpus). By chance it
    # may be of the same file, or even its own: with 16 rows, about 1 label in 32 is wrong.
    b = where(is_random[:, None] > 0, b[randperm(len(b))], b)
    ids, segments = pack(stack([a, b], 1))
    ids, labels = mask_tokens(ids, ids > MASK, len(vocabulary), MASK)  # 0 to 3 are special
    return ids, segments, labels, is_random


# ---- 9. Training ----
#
# Pre-training first, once; then fine-tuning, anew for each number of labels. The network that it
# is compared with has the same layers, the same labels, the same 100 steps of fine-tuning, and a
# rate that was chosen for it; only its encoder starts from random weights. (The new layer is
# random in both, with other numbers in each.) Pre-training gets 1,500 more steps and all training
# text, without labels: what these bring is what is measured. Neither network sees test files in
# training. 100 steps of 16 are 32, 8 and 1.6 passes over 50, 200 and 1,000 windows, the same for
# both; more steps might help the other.
#
# All chance in a step comes from its number and the seed. So a run that was stopped and goes on
# from its checkpoint ends with the same weights, if --steps is the same: the rate depends on it.


def build(args, vocabulary):
    """A new model and its optimizer; a seed always gives the same first weights."""
    manual_seed(args.seed)
    model = Bert(Encoder(len(vocabulary), 64, 2, 4, WINDOW + 3)).to(args.device)
    for weight in model.parameters():
        if weight.dim() > 1:  # .02 suits sums over 768 dimensions; over 64 they would be small
            nn.init.normal_(weight, std=0.06)
    return model, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))


def train(model, optimizer, loss_at, steps, lr, args, done=0, save=None):
    """Steps done + 1 to `steps` on loss_at(step), or until Ctrl-C -> whether Ctrl-C it was."""
    from tqdm import tqdm

    stop = []
    with suppress(ValueError):  # a thread can't handle signals
        signal(SIGINT, lambda *_: stop.append(True))
    model.train()
    for step in tqdm(range(done + 1, steps + 1)):
        manual_seed(args.seed * 10_000_000 + step)
        part = step / steps
        # Up to 10/11 of lr, at 1/11 of the steps, then down: the last step has rate 0 and changes
        # nothing.
        optimizer.param_groups[0]["lr"] = lr * min(10 * part, 1 - part)

        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        # Clipped to length 1, as in the official code. If a number in the gradient is not finite,
        # its length isn't either.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise SystemExit(f"bert.py: loss {loss} or its gradient not finite at step {step}")
        optimizer.step()

        if stop or step % 100 == 0 or step == steps:
            tqdm.write(f"step {step}/{steps} | loss {loss:.3f}")
            if save:
                save_checkpoint(save, step, model, optimizer, args)
        if stop:
            break
    with suppress(ValueError):
        signal(SIGINT, default_int_handler)
    model.eval()
    return stop


def fine_tune(bert, x, lr, args):
    """A copy of the encoder and a new layer, trained on x (classes, n, 2, 64) -> Classifier."""
    n = x.shape[1]
    model = Classifier(copy.deepcopy(bert), len(x)).to(x.device)
    optimizer = torch.optim.AdamW(model.parameters())

    def loss_at(step):
        row = randint(len(x) * n, (16,), device=x.device)
        return cross_entropy(model(*pack(x.flatten(0, 1)[row])), row // n)

    train(model, optimizer, loss_at, min(100, args.steps), lr, args)
    return model


def save_checkpoint(path, step, model, optimizer, args):
    """Everything that the next step depends on, but for the text, which is read again."""
    state = dict(
        script="bert",
        step=step,
        args=vars(args),
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
    )
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)  # all or nothing: a crash while saving leaves the old file


def load_checkpoint(args, model, optimizer):
    """Fills model and optimizer from args.load -> the number of steps that were done."""
    state = torch.load(args.load, map_location="cpu", weights_only=True)
    if state["script"] != "bert":
        raise ValueError(f"{args.load} is not a checkpoint of bert.py")
    # Else it would be another run. (Another Python's library has other words: stay with one.)
    for name in ("seed", "batch_size", "lr"):
        if state["args"][name] != getattr(args, name):
            raise ValueError(f"{args.load} was trained with {name} = {state['args'][name]}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---- 10. Evaluation and picture ----
#
# Does pre-training pay? Two networks learn from the same few labels: one starts with what it has
# read, the other with random weights. Beside them stands a judge that is no network: logistic
# regression on the strings of 1 to 4 bytes in a window (tf-idf: rare strings weigh more). Such
# strings are pieces of names, and packages differ in the names that they use.


@no_grad()
def accuracy(model, x):
    """The share of the windows x (classes, n, 2, 64) whose class the classifier names."""
    right = 0
    for label, rows in enumerate(x):
        right += (model(*pack(rows)).argmax(1) == label).float().mean().item()
    return right / len(x)


def bag_of_bytes(x, test, vocabulary):
    """The same for logistic regression on all strings of 1 to 4 bytes (tf-idf)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def texts(x):
        return ["".join(vocabulary[i] for i in row) for row in x.flatten(2).flatten(0, 1)]

    # C = 100, so a small penalty on its weights, was the best of 1, 10, 100 on validation files.
    label = torch.arange(len(x))
    # A string that occurs n times counts as 1 + ln n; each row is scaled to length 1.
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True
    )
    model = LogisticRegression(C=100, max_iter=1000)
    model.fit(vectorizer.fit_transform(texts(x)), label.repeat_interleave(x.shape[1]))
    return model.score(vectorizer.transform(texts(test)), label.repeat_interleave(test.shape[1]))


def compare(bert, train, test, vocabulary, args):
    """-> test accuracies, a list of three for each number of labels."""
    new = build(args, vocabulary)[0].bert
    scores = []
    for n in COUNTS:
        manual_seed(args.seed)
        x = train[:, randperm(train.shape[1])[:n]]  # (10, n, 2, 64), the same for all three
        # Each has its own rate, the best of the few that were tried on validation files, with one
        # seed (10). Pre-trained, 20 labels: 1e-3 .290, 3e-3 .310; 100 labels: 2e-3 .333, 3e-3
        # .367. From scratch, 20 labels, with other batch sizes: 1e-3 .187, 2e-3 .210, 4e-3 .173.
        tuned = accuracy(fine_tune(bert, x, 3e-3, args), test)
        scratch = accuracy(fine_tune(new, x, 2e-3, args), test)
        bag = bag_of_bytes(x, test, vocabulary)
        scores.append([tuned, scratch, bag])
        print(
            f"{n} labels a class | pre-trained {tuned:.4f}"  # accuracy on test files
            f" | scratch {scratch:.4f} | bag {bag:.4f}"
        )
    return scores


@no_grad()
def read_unseen(model, x, vocabulary):
    """Both tasks on windows x (n, 2, 64) of unseen files -> share of right pairs, filled text."""
    manual_seed(0)
    ids, segments, labels, is_random = pairs(x, vocabulary)
    chosen = labels != IGNORE
    words, pair = model(ids, segments, chosen=chosen)
    p, guess = words.softmax(1).topk(3)  # (chosen, 3)
    text = "".join(vocabulary[i] for i in ids[0]) + "\n\nhidden, two guesses, probabilities"
    # The places of window 0 come first in guess and p, and zip ends with them.
    for true, i, q in zip(labels[0][chosen[0]], guess, p):
        text += f"\n{vocabulary[true]!r:18}"
        text += f"{vocabulary[i[0]]!r:>20} {q[0]:.2f}"
        text += f"{vocabulary[i[1]]!r:>20} {q[1]:.2f}"
    right = (pair.argmax(1) == is_random).float().mean().item()
    return right, re.sub(r"[^\n -~]", "?", text)  # fonts lack control characters


def draw_picture(path, scores, text):
    """Accuracy against the number of labels; a window with gaps, and what the network says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6))
    left = figure.add_axes((0.05, 0.1, 0.35, 0.85))
    if scores:
        left.semilogx(COUNTS, scores, "o-", label=["pre-trained", "from scratch", "bag of bytes"])
        left.legend()
    left.set(xlabel="labels a class", ylabel="test accuracy, chance .1")
    figure.text(0.43, 0.95, text, va="top", family="monospace", parse_math=False)
    figure.savefig(path)


# ---- 11. Command line ----
#
# What has no flag is a number in `build`, `fine_tune` or `compare`: to change it, edit it there.


def parse(argv):
    """-> arguments, vocabulary, windows, data, model, optimizer, done. Bad input ends here."""
    parser = argparse.ArgumentParser()
    flag = parser.add_argument
    flag("--steps", type=int, default=1500)  # of pre-training; paper: 1,000,000
    flag("--batch-size", type=int, default=16)  # paper: 256
    flag("--lr", type=float, default=3e-3)  # its peak is 10/11 of this; paper: 1e-4
    flag("--seed", type=int, default=0)
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flag("--out", default="out")
    flag("--save")  # checkpoint to write, every 100 steps and at the end
    flag("--load")  # checkpoint to go on from, up to --steps, and to fine-tune
    flag("--quick", action="store_true")  # 4 small steps of everything, for a test
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = args.batch_size = 4
    try:  # an error becomes one line on stderr and exit status 2
        import matplotlib.figure, sklearn, tqdm  # noqa: E401, F401, I001  is one missing?

        if args.steps < 1 or args.batch_size < 2 or not 0 < args.lr < 10:
            raise ValueError("--steps must be at least 1, --batch-size 2, --lr in (0, 10)")
        vocabulary, windows, data = load_data(args.device)
        if args.quick:
            data = {split: x[:, :4] for split, x in data.items()}
        model, optimizer = build(args, vocabulary)
        done = 0
        if args.load:
            done = load_checkpoint(args, model, optimizer)
        os.makedirs(args.out, exist_ok=True)
        if args.save:  # a path that can't be written is found now
            save_checkpoint(args.save, done, model, optimizer, args)
    except Exception as error:
        parser.error(" ".join(str(error).split()))
    return args, vocabulary, windows, data, model, optimizer, done


def main(argv=None):
    args, vocabulary, windows, data, model, optimizer, done = parse(argv)
    size = sum(p.numel() for p in model.parameters())
    print(f"bert | {size / 1e6:.2f}M parameters | {args.device} | seed {args.seed} | ten packages")

    def loss_at(step):
        x = windows[randint(len(windows), (args.batch_size,))]
        return model.loss(*pairs(x, vocabulary))

    stopped = train(model, optimizer, loss_at, args.steps, args.lr, args, done, args.save)
    # metric: here the share of right pairs, below the test accuracy; main returns the last one.
    metric, text = read_unseen(model, data["test"].flatten(0, 1), vocabulary)
    print(f"{text}\n\ntest: next sentence or not {metric:.4f} | chance 0.5")
    scores = []
    if not stopped:
        scores = compare(model.bert, data["train"], data["test"], vocabulary, args)
        metric, scratch, bag = scores[1]  # COUNTS[1] = 20
        print(
            f"test accuracy at 20 labels a class {metric:.4f} | from scratch {scratch:.4f}"
            f" | bag of bytes {bag:.4f} | chance 0.100"
        )
    draw_picture(f"{args.out}/bert.png", scores, text)
    return metric


if __name__ == "__main__":
    main()
