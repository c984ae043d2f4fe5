# Completion of options for bash (and zsh, after `autoload -U bashcompinit && bashcompinit`):
#
#     source extras/completion.bash
#
# Then Tab completes the options and choices of train.py, distill.py, generate.py, fid.py, example.py, convert.py,
# dataset_tool.py and report.py behind `python` and `torchrun`. Everything else is completed as before: by file names.

_edm_distill() {
    local scripts=" train.py distill.py generate.py fid.py example.py convert.py dataset_tool.py report.py "
    local start script="" index word
    COMPREPLY=()
    # "--cond=1" comes as three words where "=" breaks words: the scripts want it as one
    local words=() current=0
    for ((index = 0; index < ${#COMP_WORDS[@]}; index++)); do
        word=${COMP_WORDS[index]}
        if [[ $word == "=" && ${#words[@]} -gt 0 ]]; then
            words[${#words[@]}-1]+="="
        elif [[ ${#words[@]} -gt 0 && ${words[${#words[@]}-1]} == --*= ]]; then
            words[${#words[@]}-1]+=$word
        else
            words+=("$word")
        fi
        ((index == COMP_CWORD)) && current=$((${#words[@]} - 1))
    done
    for ((start = 1; start < current; start++)); do
        word=${words[start]}
        if [[ $scripts == *" ${word##*/} "* && -f $word ]]; then
            script=$word
            break
        fi
    done
    [[ -n $script ]] || return 0
    local python=${words[0]} name=${script##*/} value kind
    [[ ${python##*/} == python* ]] || python=python
    local prefix=""
    [[ ${words[current]} == --*=* ]] && prefix=${words[current]%%=*}=
    while IFS=, read -r kind value; do
        [[ $kind == plain ]] || continue
        [[ $COMP_WORDBREAKS == *=* ]] && value=${value#"$prefix"}
        COMPREPLY+=("$value")
    done < <(
        name=${name//./_}
        env "_${name^^}_COMPLETE=bash_complete" COMP_WORDS="${words[*]:start}" COMP_CWORD=$((current - start)) \
            "$python" "$script" 2>/dev/null
    )
}

complete -o default -o nosort -F _edm_distill python python3 torchrun
