"""Scripts of others, read without running them: what sbatch, bash and their programs would see."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import shell

SCRIPTS = sorted((Path(__file__).parent / "data" / "scripts").glob("*.sbatch"))


def commands(text: str) -> list[list[str]]:
    return [
        [word.partial if word.value is None else word.value for word in command.argv]
        for command in shell.read(text).commands
    ]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("#SBATCH --nodes=4", [("nodes", "4")]),
        ("#SBATCH --nodes 4", [("nodes", "4")]),
        ("#SBATCH -N4", [("nodes", "4")]),
        ("#SBATCH -N 4 -p gpu", [("nodes", "4"), ("partition", "gpu")]),
        ("#SBATCH --exclusive --time=1:00", [("exclusive", None), ("time", "1:00")]),
        ("#SBATCH --exclusive=user", [("exclusive", "user")]),
        ("#SBATCH --comment='two words'  # said", [("comment", "two words")]),
        ('#SBATCH -J "a b"', [("job-name", "a b")]),
        ("#SBATCH --ntasks-per-n=8", [("ntasks-per-node", "8")]),  # getopt takes what fits one name alone
        ("#SBATCH -Hk", [("hold", None), ("no-kill", None)]),
        ("##SBATCH --nodes=4", []),
        ("# SBATCH --nodes=4", []),
        ("#SBATCH # --nodes=4", []),
    ],
)
def test_directives_are_read_as_sbatch_reads_them(line, found):
    script = shell.read(f"#!/bin/bash\n{line}\necho\n")
    assert [(one.option, one.value) for one in script.directives] == found


def test_a_directive_behind_the_first_command_is_late_and_has_its_place():
    script = shell.read("#!/bin/bash\n#SBATCH -N 1\n\n# a comment\ndate\n  #SBATCH\n#SBATCH --mem=0\n")
    assert [(one.option, one.line, one.column) for one in script.directives] == [("nodes", 2, 9)]
    assert [(one.option, one.line) for one in script.late] == [("mem", 7)]
    assert [one.option for one in shell.read("##SBATCH --qos=a\ndate").disabled] == ["qos"]


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        ("A=b\npython $A.py", ["python", "b.py"]),
        ("A='x  y'\npython $A", ["python", "x", "y"]),
        ("A='x  y'\npython \"$A\"", ["python", "x  y"]),
        ("A=(1 'two 3')\nA+=(4)\npython ${A[@]}", ["python", "1", "two 3", "4"]),
        ('A=(1 "two 3")\npython "${A[@]}"', ["python", "1", "two 3"]),
        ("python ${A:-x/y}", ["python", "x/y"]),
        ("A=\npython ${A:-$B}", ["python", "${B}"]),
        ("A=/d/train.tar.gz\npython ${A##*/} ${A%.*} ${A%%.*} ${A/train/eval}",
         ["python", "train.tar.gz", "/d/train.tar", "/d/train", "/d/eval.tar.gz"]),
        ("N=3\npython $((N * 8)) $(($N-1)) $(expr $N + 1)", ["python", "24", "2", "4"]),
        ("python $(echo a b) $(basename /x/y.sh .sh) `dirname /x/y`", ["python", "a", "b", "y", "/x"]),
        ("python a\\ b 'c d' \"e f\" $'g\\th' '$HOME' \"\\$HOME\"",
         ["python", "a b", "c d", "e f", "g\th", "$HOME", "$HOME"]),
        ("python --a=$X/b", ["python", "--a=${X}/b"]),
        ("A=1\nif true; then A=2; fi\npython $A", ["python", "1"]),  # what a branch may say is not certain
        ("if [ -z \"$A\" ]; then A=2; fi\npython $A", ["python", "2"]),
        ("f() { local cfg=$1; python $cfg $2; }\nX=a\nf $X.yaml b", ["python", "a.yaml", "b"]),
        ("(A=2)\npython $A", ["python", "${A}"]),
        ("A=1\nunset A\npython $A", ["python", "${A}"]),
        ("N=3\nLOG=$D/%x_$N.log\npython $LOG", ["python", "${D}/%x_3.log"]),
        ("python --log=$D/a_$1", ["python", "--log=${D}/a_$1"]),
        ("python --log=$D/%x_$D.log\n", ["python", "--log=${D}/%x_${D}.log"]),
        ("OUT=$S/$U/d/\npython $OUT/a --p=$U:$V/$W", ["python", "${S}/${U}/d//a", "--p=${U}:${V}/${W}"]),
        ("export A=$S/$U/d B=2\npython $A $B", ["python", "${S}/${U}/d", "2"]),
        ("python ${PATH:+x:$PATH} ${LD_LIBRARY_PATH:-y}", ["python", "${PATH:+x:$PATH}", "${LD_LIBRARY_PATH:-y}"]),
        ("A=(1 2)\nA=\"${A[@]} 3\"\npython $A", ["python", "1", "2", "3"]),
        ("A=1\nif [ $A = 1 ]; then B=x; else B=y; fi\npython $B", ["python", "x"]),
        ("if f; then B=x; elif g; then B=y; else B=z; fi\npython $B", ["python", "z"]),
        ("A=1\n[ $A -ge 2 ] || B=x\npython $B", ["python", "x"]),
        ("[ -d /x ] && A=--y\npython $A b", ["python", "b"]),
        ("[ -d /x ] && A=/x\npython $A b", ["python", "/x", "b"]),
        ("A=/d\npython $(f $A/${A}x '{print $1}')", ["python", "$(f /d//dx '{print $1}')"]),
        ("N=3\npython $((${N:-8} * 2)) $((${M:-8} * 2)) $(expr 4 \\* $N + 1)", ["python", "6", "16", "13"]),
        ('A=(1 2)\npython "${A[@]:?none}" ${A[1]:?}', ["python", "1", "2", "2"]),
        ("A=\"  --x \\\n   --y $B \\\n  $C\"\npython $A", ["python", "--x", "--y", "${B}", "${C}"]),
    ],
)  # fmt: skip
def test_words_are_what_the_program_would_get(text, argv):
    assert commands(text)[-1] == argv


def test_arguments_that_are_told_are_what_they_stand_for():
    text = 'X=$1\npython $X "$2" ${3:-d} ${4:-e} "$@"\nshift\npython $1'
    made = shell.read(text, arguments=["a", "b c", "3"])
    found = [[word.value for word in one.argv] for one in made.commands]
    assert found == [["python", "a", "b c", "3", "e", "a", "b c", "3"], ["shift"], ["python", "b", "c"]]


def test_two_parentheses_behind_a_substitution_may_be_a_command():
    made = shell.read("export RANK=$(((SLURM_NODEID)) && echo 1 || echo 0)\npython a.py\n")
    assert [one.name for one in made.commands if "substitution" not in one.inside] == ["python"]
    assert not made.broken


def test_counts_of_the_directives_are_known():
    head = "#SBATCH --nodes=4 --ntasks-per-node=2 --gres=gpu:a100:8\n"
    assert commands(head + "python $((SLURM_NNODES*SLURM_GPUS_ON_NODE)) $SLURM_NTASKS")[-1] == ["python", "32", "8"]


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ('$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', "first-node"),
        ("`scontrol show hostname $SLURM_NODELIST | head -1`", "first-node"),
        ("$(scontrol show hostnames $SLURM_JOB_NODELIST | sed -n 1p)", "first-node"),
        ("$(srun --nodes=1 --ntasks=1 hostname --ip-address)", "first-node"),
        ("$(hostname -I | awk '{print $1}')", "this-address"),
        ("$(hostname)", "this-node"),
        ("$SLURM_PROCID", "rank"),
        ("$SLURM_NODEID", "node-rank"),
        ("$(( 10000 + SLURM_JOBID % 1000 ))", "job-id"),
        ("$(expr 10000 + $(echo -n $SLURM_JOBID | tail -c 4))", "job-id"),
        ("$SLURM_TMPDIR", "local-disk"),
        ("$(pwd)", "submit-dir"),
    ],
)
def test_what_only_a_running_job_knows_has_a_meaning(value, meaning):
    word = shell.read(f"X={value}\npython $X").commands[-1].argv[1]
    assert (word.value, word.meaning) == (None, meaning)


def test_the_nodes_in_an_array_are_known_by_their_place():
    text = "nodes=($(scontrol show hostnames $SLURM_NODELIST))\nhead=${nodes[0]}\npython $head ${nodes[3]}"
    assert [word.meaning for word in shell.read(text).commands[-1].argv] == ["", "first-node", "hosts"]


def test_a_command_says_what_stands_around_it():
    text = "srun -n2 a 2>&1 | tee log &\nb || exit 1\nfor i in 1 2; do c $i & done\nf() { d; }\n( e )\n"
    found = {command.name: command for command in shell.read(text).commands}
    assert found["srun"].pipeline == found["tee"].pipeline != 0
    assert (found["srun"].last, found["tee"].last, found["srun"].background) == (False, True, True)
    assert [one.operator for one in found["srun"].redirects] == ["2>&"]
    assert (found["b"].after, found["exit"].before) == ("||", "||")
    assert found["c"].inside == ("for",)
    assert found["c"].background
    assert (found["d"].inside, found["e"].inside) == (("function f",), ("subshell",))
    assert shell.read(text).loops == {"i": ("1", "2")}


def test_nested_shells_are_read_too():
    text = "export X=1\nY=2\nsrun bash -c \"torchrun --node_rank \\$SLURM_PROCID $Y.py\"\nsrun bash -c 'run $X $Y'\n"
    first, second = [command.script for command in shell.read(text).commands if command.script]
    assert [word.partial for word in first.commands[0].argv] == ["torchrun", "--node_rank", "${SLURM_PROCID}", "2.py"]
    assert first.commands[0].argv[2].meaning == "rank"
    # single quotes: what is exported arrives, the rest does not
    assert [word.partial for word in second.commands[0].argv] == ["run", "1", "${Y}"]


def test_heredocs_are_files_and_scripts():
    text = (
        "N=2\ncat > c.json <<EOT\n{\"a\": $N}\nEOT\ncat <<'EOT' > run.sh\npython $1 $N\nEOT\nsrun bash run.sh t.py\n"
    )
    script = shell.read(text)
    assert (script.files["c.json"].text, script.files["run.sh"].text) == ('{"a": 2}\n', "python $1 $N\n")
    nested = script.commands[-1].script
    assert nested is not None
    assert [word.partial for word in nested.commands[0].argv] == ["python", "t.py", "${N}"]
    assert nested.commands[0].line == 6


def test_flags_traps_and_exports_are_kept():
    script = shell.read(
        "#!/bin/bash -l\nset -euo pipefail\ntrap 'scancel $SLURM_JOB_ID' TERM INT\nexport A=1 B\nB=2\n"
    )
    assert script.options == {"errexit", "nounset", "pipefail"}
    assert [(trap.action, trap.signals) for trap in script.traps] == [("scancel $SLURM_JOB_ID", ("TERM", "INT"))]
    assert {one.name for one in script.assignments if one.exported} == {"A", "B"}


def test_srun_s_options_are_told_from_the_program():
    command = shell.read("srun -N2 -lu --gpu-bind none --container-image=a -K1 --wait 60 python -N 3").commands[0]
    options, rest = shell.options(command.argv[1:])
    given = [(one.name, one.value.value if one.value else None) for one in options]
    assert given == [
        ("nodes", "2"), ("label", None), ("unbuffered", None), ("gpu-bind", "none"), ("container-image", "a"),
        ("kill-on-bad-exit", "1"), ("wait", "60"),
    ]  # fmt: skip
    assert [word.value for word in rest] == ["python", "-N", "3"]


def test_a_word_can_be_resolved_further():
    word = shell.read("python --rank=$SLURM_NODEID").commands[0].argv[1]
    assert (word.left, shell.resolve(word, {"SLURM_NODEID": "3"}).value) == (("SLURM_NODEID",), "--rank=3")


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_piece_of_a_script_makes_the_reader_stumble(path):
    """Cut anywhere a script is odd: open quotes, heredocs without end, half a function."""
    text = path.read_text()
    for end in range(0, len(text), max(len(text) // 23, 1)):
        list(shell.read(text[:end], path.name).everything())
        list(shell.read(text[end:], path.name).everything())


@pytest.mark.parametrize(
    "text", ["", "\x00", "((", "$(", "`", '"', "fi", "<<EOF", "x=(", "\udcff", "${", "a() {", "\\"]
)
def test_what_is_no_script_is_read_all_the_same(text):
    shell.read(text)
    shell.read(f"#SBATCH --x='\n{text}")


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ('[ "$A" = 1 ]', True), ("[[ $A == [0-9] && $B != x ]]", True), ("[ $A -gt 2 ] || [ -n \"$B\" ]", True),
        ("test $A -lt 1", None), ("! [ -z \"$B\" ]", True), ("[ $A != 1 ]", False), ('[ "$A" = "[0-9]" ]', False),
        ("[ -d /x ]", None), ("[ $C = 1 ]", None), ("[ $A = 1 ] && [ -d /x ]", None), ("[ $A = 2 ] && f", False),
        ("[ $A ]", None), ("[ a -gt 1 ]", None), ("f", None), ("(( A > 0 ))", None),
    ],
)  # fmt: skip
def test_a_condition_is_decided_where_the_script_itself_has_set_its_values(condition, holds):
    script = shell.read(f"A=1\nB=y\nX=0\nif {condition}; then X=1; fi\n")
    value = script.variables["X"][0][0].text
    if holds is None:
        assert [(one.name, one.taken, one.other, one.line) for one in script.choices] == [("X", "0", "1", 4)]
    else:
        assert (value, script.choices) == (str(int(holds)), ())


def test_a_branch_that_is_never_run_is_read_and_marked():
    script = shell.read("A=1\nif [ $A = 2 ]; then far; else near; fi\nmaybe && B=3\n")
    found = {command.name: command.inside for command in script.commands}
    assert found["far"] == ("if", "never")
    assert found["near"] == ()
    assert not script.choices


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ('run() { srun "$@"; }\nrun a b\nrun c', ["srun", "c"]),
        ('run() { n=$1; shift; srun -N $n "$@"; }\nrun 2 a "b c"', ["srun", "-N", "2", "a", "b c"]),
        ('run() { srun "$*"; }\nrun a b', ["srun", "a b"]),
        ('run() { srun "${@:2}"; }\nrun a b c', ["srun", "b", "c"]),
        ('run() { run "$@"; }\nrun a', ["run", "a"]),
        ('T=(a b c)\nsrun "${T[@]:1}"', ["srun", "b", "c"]),
        ('T=(a b c)\nsrun "${T[@]:0:1}"', ["srun", "a"]),
        ('run() { srun "$@"; }', ["srun", "${@}"]),
    ],
)
def test_arguments_of_functions_and_parts_of_arrays(text, last):
    assert [word.replace("$@", "${@}") for word in commands(text)[-1]] == last


@pytest.mark.parametrize(("text", "line"), [("a\nif [ 1 ; then\nb\nfi", 2), ('a\necho "b\nc', 2), ("a\nb $(c", 2)])
def test_where_a_script_makes_no_sense(text, line):
    assert shell.read(text).broken[0].line == line


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_whole_script_makes_sense(path):
    assert shell.read(path.read_text()).broken == ()


@pytest.mark.parametrize(
    ("option", "other"),
    [("gpu-per-node", "gpus-per-node"), ("ntasks_per_node", "ntasks-per-node"), ("nodes", ""), ("uenv", ""),
     ("kill-on-bad-exit", "")],
)  # fmt: skip
def test_the_option_that_was_meant(option, other):
    assert shell.near(option) == other
