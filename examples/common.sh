# Functions of the quickstart scripts, which source this file in the project's root: run commands, make the shared data.

python=${PYTHON:-python3}
# Two processes share the cores; more threads than cores would only make them wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun=("$python" -m torch.distributed.run --nproc-per-node 2)

# make runs the Python of .venv without activating it. A command that a user pastes needs the activation, so print it.
case $(command -v "$python") in
    "$PWD"/.venv/*) [ "${VIRTUAL_ENV:-}" = "$PWD/.venv" ] || echo '$ . .venv/bin/activate' ;;
esac

print_command() { # WORDS...: prints them as a command that can be pasted, in lines of about 110 columns
    local line='$' parts=() previous='' word shown
    for word in "$@"; do
        case $word in
            *\'*) printf -v shown %q "$word" ;;
            '' | *[!A-Za-z0-9_./:=,+@-]*) shown="'$word'" ;;
            *) shown=$word ;;
        esac
        # A line does not break between a flag and its first value.
        if [[ $previous == -* && $word != -* ]]; then
            parts[${#parts[@]} - 1]+=" $shown"
        else
            parts+=("$shown")
        fi
        previous=$word
    done
    for shown in "${parts[@]}"; do
        if [ $((${#line} + ${#shown})) -gt 108 ] && [ "$line" != '$' ]; then
            printf '%s \\\n' "$line"
            line='   '
        fi
        line+=" $shown"
    done
    printf '%s\n' "$line"
}

run() { # prints the command so that it can be pasted, then runs it
    echo
    print_command "$@"
    "$@"
}

fresh_directory() { # DIRECTORY MARKER: creates DIRECTORY/MARKER; empties DIRECTORY first if an earlier run made it
    if [ -e "$1" ] && [ ! -d "$1/$2" ] && [ -n "$(ls -A "$1")" ]; then
        echo "error: $1: holds files that this script did not make; give another directory" >&2
        exit 2
    fi
    rm -rf "$1"
    mkdir -p "$1/$2"
}

find_or_make_data() { # DIRECTORY: sets $data to QUICKSTART if this directory contains data, else makes data in DIRECTORY
    data=${QUICKSTART:-runs/quickstart}
    if [ -f "$data/held_out_text_document.idx" ] && [ -f "$data/tokenizer/tokenizer.json" ]; then
        return
    fi
    data=$1
    echo "== 0. Corpus, tokenizer and indexed datasets (as in make quickstart)"
    find_or_make_text "$data"
    tokenize "$text" "$data" 4096
}

find_or_make_text() { # DIRECTORY: sets $text to QUICKSTART if this directory contains the corpus, else writes it to DIRECTORY
    text=${QUICKSTART:-runs/quickstart}
    if [ -f "$text/train.jsonl" ] && [ -f "$text/held_out.jsonl" ]; then
        return
    fi
    text=$1
    run "$python" tools/build_corpus.py --output "$1/train.jsonl" --held-out "$1/held_out.jsonl" \
        --max-bytes "${CORPUS_BYTES:-8000000}" --held-out-fraction 0.1
}

tokenize() { # TEXT OUTPUT SIZE: trains a tokenizer of SIZE ids on the text in TEXT, and writes indexed datasets to OUTPUT
    run "$python" tools/train_tokenizer.py --input "$1/train.jsonl" --output-dir "$2/tokenizer" --vocab-size "$3"
    local part
    for part in train held_out; do
        run "$python" tools/preprocess_data.py --input "$1/$part.jsonl" --output-prefix "$2/$part" --append-eod \
            --vocab-file "$2/tokenizer/vocab.json" --merge-file "$2/tokenizer/merges.txt"
    done
}
