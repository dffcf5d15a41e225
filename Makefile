# make repro   install, fetch the embedded data, run the pipeline, print the results
# make test    install, check and test everything, the whole pipeline in small included
# make lab     JupyterLab on the notebooks
# make docs    the notebooks as a book, under _docs/site
# make nightly 100,000 fuzzed files instead of 4,000; where detectron2 is installed, 20 images at full size through both engines;
#              the recipe coco rehearsed on drawn images: benchmarks/results/recipe.md; the road of own photographs, from
#              `u2seg use photos` to a fine-tuned model: benchmarks/results/photos.md; and every stage stopped at random
#              moments, through `dvc repro` and on two hosts: benchmarks/results/stops.md, hosts.md
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: repro test nightly lab docs publish
repro: $(VENV)/installed
	dvc pull data.dvc features
	dvc fetch -q out/report/headline.json
	u2seg check
	dvc repro
	u2seg table

test: $(VENV)/installed
	dvc pull data.dvc features
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 U2SEG_THREADS=1 nbdev_test --n_workers 2
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 U2SEG_THREADS=1 python -m pytest -q --instafail -n 2 --dist loadfile --durations 10 tests

nightly: $(VENV)/installed
	OMP_NUM_THREADS=1 U2SEG_THREADS=1 U2SEG_FUZZ=100000 U2SEG_SLOW=1 python -m pytest -q --instafail -n 2 --timeout 0 tests/test_fuzz.py tests/test_detectron2_parity.py
	python benchmarks/recipe.py coco
	python benchmarks/photos.py --work $$(mktemp -d)/work
	python benchmarks/stops.py --out benchmarks/results/stops.md
	python benchmarks/stops.py --hosts --out benchmarks/results/hosts.md

lab: $(VENV)/installed
	jupyter lab --notebook-dir=nbs

docs: $(VENV)/installed
	pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	python -W ignore -c "from u2seg.site import prepare; prepare('.', '_docs')"
	NO_MKDOCS_2_WARNING=1 mkdocs build -q -f _docs/mkdocs.yml
	@echo "open _docs/site/index.html"

# after a good run: copy the stages' outputs into nbs/, so that the notebooks read as the paper, and what travels into
# .dvc/store; features is fetched, not run: u2seg publish features after a run of its own
publish: $(VENV)/installed
	u2seg publish maskcut cutler cluster stego panoptic train evaluate fewshot report
	dvc commit -q -f dvc.yaml
	dvc push -q

$(VENV)/installed: setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else "u2seg needs Python 3.10 to 3.13; this is %d.%d. Name another one: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
