#!/usr/bin/env bash
# SOURCE TO UNPACK ACTIVATE RUNS: copies to this node's disk, once, however many tasks ask. stdout: why it could not.
set -euo pipefail
source=$1 to=$2 unpack=$3 activate=$4 runs=$5
say() {
  echo "$*"
  exit 74
}
size() { numfmt --to=iec-i --suffix=B "$1"; }
last() { tail -n 1 <<<"$1"; }

[ -e "$source" ] || say "there is no $source"
parent=$(dirname -- "$to")
text=$(mkdir -p -- "$parent" 2>&1) || say "$text"
[ -w "$parent" ] || say "$parent cannot be written"
mark=$to.staged
mine() { # in a directory that others can write to, these may be theirs
  local path
  for path in "$to.lock" "$mark" "$to"; do
    if [ -L "$path" ] || { [ -e "$path" ] && [ ! -O "$path" ]; }; then
      say "$path is there already, and is a link or somebody else's"
    fi
  done
}
(((8#$(stat -Lc %a -- "$parent") & 8#1002) != 2)) ||
  say "anybody can replace what is in $parent: it is writable for all, and not sticky"
mine
exec 9>>"$to.lock"
flock 9 # the other tasks of this node wait here
mine

stamp="$(stat -Lc '%s %Y' -- "$source") $unpack $activate $source"
if [ -e "$mark" ]; then
  if [ -e "$to" ] && [ "$(cat -- "$mark")" = "$stamp" ]; then exit 0; fi # an earlier start in this allocation
elif [ -e "$to" ] || [ -L "$to" ]; then
  say "$to is there already, and nothing that dslaunch put there"
fi
rm -f -- "$mark"
set -o noclobber # nothing that came in between is written to
echo unfinished >"$mark" # whoever is killed from here on leaves nothing that is taken for a copy
set +o noclobber
rm -rf -- "$to"

need=$(du -s --apparent-size -B1 -- "$(readlink -f -- "$source")" | cut -f1)
free=$(df --output=avail -B1 -- "$parent" | tail -n 1)
((need <= free)) || say "$source has $(size "$need") and $parent has $(size "$free") left"

if [ -d "$source" ]; then
  text=$(mkdir -- "$to" 2>&1 && cp -a -- "$source/." "$to" 2>&1) || say "cannot copy $source: $(last "$text")"
elif [ "$unpack" = 0 ]; then
  text=$(cp -L --preserve=mode,timestamps -- "$source" "$to" 2>&1) ||
    say "cannot copy $source: $(last "$text")"
else
  case $source in
    *.squashfs) text=$(unsquashfs -no-progress -dest "$to" "$source" 2>&1) ;;
    *) mkdir -- "$to" && text=$(tar -xf "$source" -C "$to" 2>&1) ;;
  esac || say "cannot unpack $source: $(last "$text")"
fi

if [ "$activate" != none ] && [ ! -e "$to/bin" ]; then # packed with its own directory around it
  inner=("$to"/*/bin)
  if ((${#inner[@]} == 1)) && [ -d "${inner[0]}" ]; then
    mv -T -- "$(dirname -- "${inner[0]}")" "$to.inner"
    rm -rf -- "$to"
    mv -T -- "$to.inner" "$to"
  fi
fi
moved() { # OLD: scripts below bin/ name their interpreter by the place where they were made
  local file text
  [ "$1" != "$to" ] || return 0
  for file in "$to"/bin/*; do
    if [ -f "$file" ] && [ ! -L "$file" ] && grep -qIF -- "$1" "$file"; then
      text=$(cat -- "$file")
      printf '%s\n' "${text//"$1"/"$to"}" >"$file"
    fi
  done
}
case $activate in
  venv)
    [ -r "$to/bin/activate" ] || say "$source is no virtual environment: it has no bin/activate"
    # shellcheck disable=SC1091  # of the environment
    moved "$(set +eu; . "$to/bin/activate" >/dev/null 2>&1; printf %s "$VIRTUAL_ENV")"
    ;;
  conda)
    if [ -e "$to/bin/conda-unpack" ]; then
      text=$("$to/bin/python" "$to/bin/conda-unpack" 2>&1) || say "conda-unpack: $(last "$text")"
    else
      moved "$(readlink -f -- "$source")"
    fi
    ;;
esac
if [ "$activate" != none ] && [ "$runs" = 1 ]; then # its base may lie where this node does not look
  prefix=$("$to/bin/python" -c 'import os, sys; print(os.path.realpath(sys.prefix))' 2>&1) ||
    say "the Python of $source does not run from $to: $(last "$prefix")"
  [ "$prefix" = "$(readlink -f -- "$to")" ] || say "the Python in $to is one of $prefix"
fi
if [ "$UID" = 0 ]; then chown -h 0 -- "$to"; fi # for root an archive keeps its owners
mine
echo "$stamp" >"$mark"
