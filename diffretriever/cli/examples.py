"""A command line of each command, for its help; tests parse them."""

EXAMPLES = {
    "encode": "encode --model RELEASE --input corpus.jsonl --output store",
    "search": 'search --model RELEASE --store store "what causes the seasons"',
    "index": "index --store store --qdrant http://localhost:6333",
    "compress": "compress --store store --output small-store",
    "export": "export --store store --model RELEASE --output impacts.jsonl",
    "evaluate": "evaluate --model RELEASE --data scifact --bm25 --json figures.json",
    "plot quality": "plot quality --input figures.json --dataset SciFact --output quality.png",
    "plot scaling": "plot scaling --input storage.json --output scaling.png",
    "plot latency": "plot latency --input latency.json --output latency.png",
    "plot budget": "plot budget --input budget.json --output budget.png",
    "fetch-backbone": "fetch-backbone smollm2-135m-instruct --output backbone",
    "pretrain": "pretrain --recipe llada-tiny --pairs pairs.jsonl --texts texts.jsonl --output runs/backbone",
    "train": "train --recipe paper-multi --model RELEASE --pairs train.jsonl --output runs/adapter",
    "mine-negatives": "mine-negatives --pairs pairs.jsonl --output train.jsonl",
    "select-budget": "select-budget --model RELEASE --pairs train.jsonl --output budget.json",
    "analyze-budget": "analyze-budget --input budget.json --json analysis.json",
    "publish list": "publish list",
    "publish build": "publish build --base GSAI-ML/LLaDA-8B-Instruct --adapter runs/adapter --output my-retriever",
    "publish check": "publish check my-retriever",
    "publish push": "publish push my-retriever --repo-id my-name/my-retriever --dry-run",
}
