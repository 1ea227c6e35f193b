# For gpus.sh and hosts.sh: the end of processes that end together.
# One that has not ended GRACE seconds after the first hangs. It is killed before the others start again: even a process that is
# stopped holds its devices, and process 0 the run's lock.
GRACE=${GRACE:-60}

# Waits until all of `pids`, process 0 first, have ended, and sets `code` to that of process 0; where it had to be killed, to
# that of the first that ended. `kill_there NUMBER`, if it is a function, kills a process that a kill here does not reach.
end_together() {
    local number left killed='' before='' until=''
    while :; do
        left=()
        for number in "${!pids[@]}"; do
            if kill -0 "${pids[number]}" 2>/dev/null; then
                left+=("$number")
            elif [[ -z $until ]]; then
                wait "${pids[number]}"
                before=$? until=$((SECONDS + GRACE))
            fi
        done
        if ((${#left[@]} == 0)); then break; fi
        if [[ -z $until ]]; then
            wait -n "${pids[@]}" # a trapped signal ends it, too
        elif ((SECONDS < until)) || [[ -n $killed ]]; then
            sleep 0.1
        else
            for number in "${left[@]}"; do
                echo "process $number has not ended with the others: killed" >&2
                if declare -F kill_there >/dev/null; then kill_there "$number"; fi
                kill -KILL "${pids[number]}" 2>/dev/null
            done
            killed=" ${left[*]} "
        fi
    done
    wait "${pids[0]}"
    code=$?
    if [[ $killed == *' 0 '* ]]; then code=$before; fi
}
