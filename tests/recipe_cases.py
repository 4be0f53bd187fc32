"""A good recipe, and every way in which one can be wrong with the whole message it gets."""

# ruff: noqa: E501 (a message is one line)

GOOD = """\
version: 1
model:
  library: torchvision
  name: fcn_resnet50
  weights: DEFAULT
  args: {num_classes: 21}
swap:
  - layers: [backbone.layer4.2.conv2]
    guidance: {from: backbone.layer1, channels: 16}
    kernel: {form: gaussian, normalize: none, blend: 0.0, bandwidth: auto}
finetune:
  data: {format: folder, root: ../data}
  stages:
    - {name: adapt, train: [added], epochs: 2, lr: 1e-3}
    - {name: joint, train: [added, head], epochs: 20, lr: {default: 1e-4, added: 1e-3}}
"""
RICH = """\
# yaml-language-server: $schema=recipe.schema.json
# Everything that a recipe can say.
version: 1
model: {library: timm, name: hf-hub:org/net, weights: ../w.safetensors, input_size: [3, 64, 96],
  args: {on: yes, text: '1e-3', no_number: '010', inf: .inf, nested: {list: [1, [2.5, null]]}}}
calibration: {images: [a.png, b.png], mean: [0, 0.5, 1], std: [1, 1, 1e-1]}
swap:
  - layers: {type: Conv2d, kernel_size: [3, 5], stride: 1, last_of_stage: true, exclude: ['a*', b]}
    guidance: [input, 're:layer[12]']
  - {layers: ['x.*', {depthwise: false}], guidance: input, override: true, kernel: {bandwidth: 1}}
finetune:
  precision: bf16
  data: {format: scenes, classes: [sky, 'no'], transforms: {scale: [0.5, 2], crop: [64, 64]}}
  optimizer: {name: sgd, momentum: 0.9}
  loss: {name: cross_entropy+dice, class_weights: [1, 2.5]}
  stages: [{name: a, train: [all, 're:bias$'], steps: 9, lr: 0.1, schedule: poly, warmup: 3}]
  control: {seeds: [0, 1], capacity: true}
"""
PATTERN = (
    "expected a group (added, swapped, guidance, head, norm, all) or a pattern (with '.' or '*', "
    "or 're:...'), got"
)
SWAP = GOOD[GOOD.index("\n  - layers") : GOOD.index("\nfinetune")]

# id: (what of GOOD is replaced, by what, the message)
EDITS = {
    "misspelt key": ("channels:", "chanels:", "recipe.yaml:9:39: swap[0].guidance.chanels: unknown key. Nearest: 'channels'."),
    "misspelt required key": ("swap:", "swop:", "recipe.yaml:7:1: swop: unknown key. Nearest: 'swap'."),
    "unknown key": ("finetune:", "x: 1\nfinetune:", "recipe.yaml:11:1: x: unknown key. Known: 'version', 'model', 'calibration', 'swap', 'pool', 'upsample', 'append', 'finetune'."),
    "missing key": ("  name: fcn_resnet50\n", "", "recipe.yaml:2:1: model.name: missing key. Expected: the model's name in its library."),
    "missing version": ("version: 1\n", "", "recipe.yaml:1:1: version: missing key. Expected: the version of the recipe's format: 1."),
    "newer version": ("version: 1\n", "version: 2\nnew: 1\n", "recipe.yaml:1:10: version: expected 1, the version this pacswap reads, got the newer 2. Upgrade: pip install --upgrade pacswap"),
    "version as text": ("version: 1", "version: '1'", "recipe.yaml:1:10: version: expected 1, got '1'."),
    "version true": ("version: 1", "version: true", "recipe.yaml:1:10: version: expected 1, got true."),
    "choice": ("torchvision", "torchvison", "recipe.yaml:3:12: model.library: expected 'timm', 'torchvision', 'python' or 'pacswap', got 'torchvison'. Nearest: 'torchvision'."),
    "number for text": ("fcn_resnet50", "5", "recipe.yaml:4:9: model.name: expected text, got 5."),
    "empty text": ("fcn_resnet50", "''", "recipe.yaml:4:9: model.name: expected some text, got an empty one."),
    "pickled weights": ("DEFAULT", "w/fcn.bin", "recipe.yaml:5:12: model.weights: expected a tag of the library or a file that ends in .safetensors, .pth or .pt, got 'w/fcn.bin'."),
    "args not a mapping": ("{num_classes: 21}", "21", "recipe.yaml:6:9: model.args: expected a mapping, got 21."),
    "model not a mapping": (GOOD[GOOD.index("\n  library") : GOOD.index("\nswap")], " fcn", "recipe.yaml:2:8: model: expected a mapping of 'library', 'name', 'weights', 'args', 'num_classes', 'input_size', got 'fcn'."),
    "two of three sizes": ("{num_classes: 21}", "{}\n  input_size: [3, 64]", "recipe.yaml:7:15: model.input_size: expected a list of three whole numbers (channels, height, width), got 2 of them."),
    "size 0": ("{num_classes: 21}", "{}\n  input_size: [3, 64, 0]", "recipe.yaml:7:23: model.input_size[2]: expected at least 1, got 0."),
    "channels 0": ("16", "0", "recipe.yaml:9:49: swap[0].guidance.channels: expected at least 1, got 0."),
    "text for number": ("16", "'16'", "recipe.yaml:9:49: swap[0].guidance.channels: expected a whole number, got '16'."),
    "true for number": ("16", "true", "recipe.yaml:9:49: swap[0].guidance.channels: expected a whole number, got true."),
    "fraction for whole": ("16", "16.5", "recipe.yaml:9:49: swap[0].guidance.channels: expected a whole number, got 16.5."),
    "yes is text": ("channels: 16", "detach: yes", "recipe.yaml:9:47: swap[0].guidance.detach: expected true or false, got 'yes'."),
    "guidance a number": ("{from: backbone.layer1, channels: 16}", "3", "recipe.yaml:9:15: swap[0].guidance: expected text, a list of texts or a mapping, got 3."),
    "guidance list entry": ("{from: backbone.layer1, channels: 16}", "[a, 5]", "recipe.yaml:9:19: swap[0].guidance[1]: expected text, got 5."),
    "layers null": ("[backbone.layer4.2.conv2]", "null", "recipe.yaml:8:13: swap[0].layers: expected text, a mapping or a list of them, got null."),
    "layers entry": ("[backbone.layer4.2.conv2]", "[7]", "recipe.yaml:8:14: swap[0].layers[0]: expected text or a mapping, got 7."),
    "layers regex": ("[backbone.layer4.2.conv2]", "'re:('", "recipe.yaml:8:13: swap[0].layers: expected a regular expression after 're:', got 're:(': missing ), unterminated subpattern at position 0."),
    "layers doubtful regex": ("[backbone.layer4.2.conv2]", "'re:[[a]'", "recipe.yaml:8:13: swap[0].layers: expected a regular expression after 're:', got 're:[[a]': Possible nested set at position 1."),
    "layers deep regex": ("[backbone.layer4.2.conv2]", "'re:" + "(" * 9999 + "'", "recipe.yaml:8:13: swap[0].layers: expected a regular expression after 're:', got 're:" + "(" * 57 + "'...: too many groups in one another."),
    "kernel_size": ("[backbone.layer4.2.conv2]", "{kernel_size: three}", "recipe.yaml:8:27: swap[0].layers.kernel_size: expected a whole number or a list of two, got 'three'."),
    "bandwidth 0": ("auto", "0", "recipe.yaml:10:70: swap[0].kernel.bandwidth: expected more than 0, got 0."),
    "bandwidth word": ("auto", "atuo", "recipe.yaml:10:70: swap[0].kernel.bandwidth: expected a number above 0 or 'auto', got 'atuo'."),
    "blend infinite": ("blend: 0.0", "blend: .inf", "recipe.yaml:10:54: swap[0].kernel.blend: expected a finite number, got inf."),
    "no swap": (SWAP, " []", "recipe.yaml:7:7: swap: expected at least 1 in the list, got 0."),
    "wrong only entry": (SWAP, " [3]", "recipe.yaml:7:8: swap[0]: expected a mapping of 'layers', 'guidance', 'kernel', 'override', got 3."),
    "epochs and steps": ("epochs: 2,", "epochs: 2, steps: 9,", "recipe.yaml:14:55: finetune.stages[0].steps: expected one of 'epochs' and 'steps', got both. Keep one."),
    "no length": ("epochs: 2, ", "", "recipe.yaml:14:7: finetune.stages[0]: expected one of 'epochs' and 'steps', got neither."),
    "misspelt length": ("epochs: 2", "epoch: 2", "recipe.yaml:14:37: finetune.stages[0].epoch: unknown key. Nearest: 'epochs'."),
    "long warmup": ("epochs: 2,", "epochs: 2, warmup: 3,", "recipe.yaml:14:56: finetune.stages[0].warmup: expected at most the stage's 2, got 3."),
    "two stages of one name": ("joint", "adapt", "recipe.yaml:15:14: finetune.stages[1].name: expected a name of its own, got 'adapt', as stages[0] has."),
    "misspelt group": ("[added]", "[addde]", f"recipe.yaml:14:29: finetune.stages[0].train[0]: {PATTERN} 'addde'. Nearest: 'added'."),
    "lr of no group": ("added: 1e-3", "layer4: 1e-3", f"recipe.yaml:15:75: finetune.stages[1].lr.layer4: {PATTERN} 'layer4'."),
    "lr without default": ("default: 1e-4, ", "", "recipe.yaml:15:55: finetune.stages[1].lr.default: missing key. Expected: the learning rate of what no other key names."),
    "lr 0": ("lr: 1e-3", "lr: 0", "recipe.yaml:14:52: finetune.stages[0].lr: expected more than 0, got 0."),
    "no root": (", root: ../data", "", "recipe.yaml:12:3: finetune.data.root: missing key. Expected: the folder of the 'folder' data."),
    "root of scenes": ("format: folder", "format: scenes", "recipe.yaml:12:32: finetune.data.root: expected none for scenes, which are drawn, got '../data'. Remove the key."),
    "masks of voc": ("folder, root: ../data", "voc, root: x, masks: y", "recipe.yaml:12:39: finetune.data.masks: expected only with format: folder, got 'y'. Remove the key."),
    "images of voc": ("folder, root: ../data", "voc, root: x, images: y", "recipe.yaml:12:40: finetune.data.images: expected only with format: folder or coco, got 'y'. Remove the key."),
    "split of scenes": ("folder, root: ../data", "scenes, val: y", "recipe.yaml:12:31: finetune.data.val: expected none for scenes, which are drawn, got 'y'. Remove the key."),
    "flip 2": ("../data", "x, transforms: {flip: 2}", "recipe.yaml:12:54: finetune.data.transforms.flip: expected at most 1, got 2."),
    "scale reversed": ("../data", "x, transforms: {scale: [2, 1]}", "recipe.yaml:12:55: finetune.data.transforms.scale: expected the smaller one first, got 2.0 and 1.0."),
    "ohem of dice": ("stages:", "loss: {name: dice, ohem: 0.3}\n  stages:", "recipe.yaml:13:28: finetune.loss.ohem: expected only with cross entropy, got 0.3. Remove the key."),
    "momentum of adamw": ("stages:", "optimizer: {momentum: 0.9}\n  stages:", "recipe.yaml:13:25: finetune.optimizer.momentum: expected only with name: sgd, got 0.9. Remove the key."),
    "doubled key": ("  weights", "  name: x\n  weights", "recipe.yaml:5:3: model.name: the key is here twice, first at 4:3. Keep one."),
    "key not text": ("num_classes:", "21:", "recipe.yaml:6:10: model.args: the key '21' is read as int, not as text. Quote or rename it."),
    "key a list": ("num_classes:", "[a]:", "recipe.yaml:6:10: model.args: a key that is a list or a mapping. A key is a word."),
    "merge key": ("num_classes: 21", "<<: {a: 1}", "recipe.yaml:6:10: model.args: merge keys (<<) are not read. Write the keys out."),
    "python tag": ("DEFAULT", "!!python/object/apply:os.system [ls]", "recipe.yaml:5:12: model.weights: the tag '!!python/object/apply:os.system' is not read: a recipe is plain data. Remove the tag."),
    "own tag": ("{num_classes: 21}", "!env {a: 1}", "recipe.yaml:6:9: model.args: the tag '!env' is not read: a recipe is plain data. Remove the tag."),
    "tab": ("  library", "\tlibrary", "recipe.yaml:3:1: not YAML: a tab where YAML takes only spaces. Indent with spaces."),
    "colon": ("DEFAULT", "DEFAULT: x", "recipe.yaml:5:19: not YAML: a ':' where no key can stand. Indent the keys of one mapping alike, and quote a text that holds ': '."),
    "indentation": ("    kernel", "  kernel", "recipe.yaml:10:3: not YAML: this is neither in the list from 8:3 nor after it. Check the indentation."),
    "bracket": ("[added]", "[added", "recipe.yaml:14:55: not YAML: while parsing a flow sequence from 14:28, expected ',' or ']', but got '}'."),
    "unknown alias": ("DEFAULT", "*none", "recipe.yaml:5:12: not YAML: found undefined alias 'none'."),
    "alias of itself": ("{num_classes: 21}", "&a {b: [*a]}", "recipe.yaml:6:9: an anchor (&) that holds an alias (*) of itself. Write it out."),
    "two documents": ("swap:", "---\nswap:", "recipe.yaml:7:1: a second document begins here. A recipe is one document: keep one of them."),
    "long number": ("21", "9" * 41, "recipe.yaml:6:23: model.args.num_classes: a number of 41 digits; 40 are read."),
    "NUL escape": ("DEFAULT", '"a\\0"', "recipe.yaml:5:12: model.weights: a text with a NUL character (\\0)."),
    "surrogate escape": ("DEFAULT", '"\\ud800"', "recipe.yaml:5:12: model.weights: a text with half a character (a surrogate, \\ud800 to \\udfff)."),
    "escape too large": ("DEFAULT", '"\\UFFFFFFFF"', "recipe.yaml:5:15: not YAML: a number in an escape (\\U...) or a % line is too large."),
    "several, in order": ("kernel: {form: gaussian, normalize: none, blend: 0.0,", "kernel: {blnd: 0, normalize: all,\n    form: 3,", """\
recipe.yaml has 3 faults:
recipe.yaml:10:14: swap[0].kernel.blnd: unknown key. Nearest: 'blend'.
recipe.yaml:10:34: swap[0].kernel.normalize: expected 'none', 'sum' or 'mean', got 'all'.
recipe.yaml:11:11: swap[0].kernel.form: expected 'gaussian', 'laplacian', 'inverse' or 'constant', got 3."""),
    "syntax and schema": ("version: 1\n", "version: 1\nversion: 2\nmodle: 1\n", """\
recipe.yaml has 2 faults:
recipe.yaml:2:1: version: the key is here twice, first at 1:1. Keep one.
recipe.yaml:3:1: modle: unknown key. Nearest: 'model'."""),
}  # fmt: skip
BOMB = "a0: &a0 [x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
MANY = "more than 20000 values, aliases (*) written out. Make the recipe smaller."
DEEP = "more than 32 lists and mappings in one another. Make the recipe flatter."
KEYS = "'version', 'model', 'calibration', 'swap', 'pool', 'upsample', 'append', 'finetune'"
# id: (the file, the message)
FILES = {
    "empty": (b"", "recipe.yaml:1:1: holds nothing but blank lines and comments."),
    "comment": (b"# a\n\n", "recipe.yaml:1:1: holds nothing but blank lines and comments."),
    "list": (b"# a\n- 1\n", f"recipe.yaml:2:1: expected a mapping of {KEYS}, got a list."),
    "text": (b"hello", f"recipe.yaml:1:1: expected a mapping of {KEYS}, got 'hello'."),
    "bad UTF-8": (b"version: 1\nmodel: \xc3\xa9\xff", "recipe.yaml:2:9: not UTF-8 text (byte 0xff). Save the file as UTF-8."),
    "UTF-16": ("version: 1".encode("utf-16"), "recipe.yaml:1:1: not UTF-8 text (byte 0xff). Save the file as UTF-8."),
    "NUL": (b"version: 1\na\0b", "recipe.yaml:2:2: the character U+0000, which is not text. Name a YAML file."),
    "large": (b"#" * (2**20 + 1), "recipe.yaml:1:1: more than 1 MiB. A recipe is a page of YAML: name the right file."),
    "alias bomb": (BOMB.encode(), f"recipe.yaml:1:19: {MANY}"),
    "wide": (b"[" + b"x," * 20_001 + b"]", f"recipe.yaml:1:40000: {MANY}"),
    "deep list": (b"[" * 10_000, f"recipe.yaml:1:33: {DEEP}"),
    "deep mapping": (b"{a: " * 10_000, f"recipe.yaml:1:126: {DEEP}"),
    "deep by aliases": (b"a: &a " + b"[" * 20 + b"]" * 20 + b"\nb: " + b"[" * 20 + b"*a" + b"]" * 20, f"recipe.yaml:1:18: {DEEP}"),
}  # fmt: skip
# id: (overrides, the message)
OVERRIDES = {
    "misspelt": (["model.weigths=null"], "override 'model.weigths=null': model.weigths: unknown key. Nearest: 'weights'."),
    "bad value": (["swap[0].guidance.channels=0"], "override 'swap[0].guidance.channels=0': swap[0].guidance.channels: expected at least 1, got 0."),
    "in a subtree": (["calibration={std: [1, 1, 0]}"], "override 'calibration={std: [1, 1, 0]}': calibration.std[2]: expected more than 0, got 0."),
    "no equals": (["model.weights"], "override 'model.weights': expected key.sub[0].x=value, such as model.weights=null."),
    "no key": (["=3"], "override '=3': expected key.sub[0].x=value, such as model.weights=null."),
    "no value": (["model.weights="], "override 'model.weights=': no value. Write model.weights=null for none, or model.weights='' for an empty text."),
    "not YAML": (["model.args={a: b: c}"], "override 'model.args={a: b: c}': not YAML: while parsing a flow mapping from 1:1, expected ',' or '}', but got ':'."),
    "doubled key": (["model.args={a: 1, a: 2}"], "override 'model.args={a: 1, a: 2}': model.args.a: the key is here twice, first at 1:2. Keep one."),
    "tag": (["model.args.x=!!python/name:os.system"], "override 'model.args.x=!!python/name:os.system': model.args.x: the tag '!!python/name:os.system' is not read: a recipe is plain data. Remove the tag."),
    "no such entry": (["swap[1].layers=x"], "override 'swap[1].layers=x': swap has no entry [1]: it has 1, counted from 0."),
    "list without index": (["swap.layers=x"], "override 'swap.layers=x': swap is a list. Say which entry: swap[0].layers."),
    "index of a mapping": (["model[0]=x"], "override 'model[0]=x': model is a mapping and has no entry [0]. Name one of its keys."),
    "below text": (["model.name.x=1"], "override 'model.name.x=1': model.name is 'fcn_resnet50' and has no keys. Override it whole: model.name={...}."),
    "several": (["finetune.seed=-1", "model.nam=x"], "recipe.yaml has 2 faults:\noverride 'finetune.seed=-1': finetune.seed: expected at least 0, got -1.\noverride 'model.nam=x': model.nam: unknown key. Nearest: 'name'."),
}  # fmt: skip
