"""Machine code from LLVM's assembly, for this processor. Knows no arithmetic."""

import platform

import llvmlite.binding as llvm


def finding() -> str | None:
    """Return why kernels do not work on this processor, or None if they do."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return None
    if machine not in ("x86_64", "amd64"):
        return f"it is not tried on {machine} processors"
    if not llvm.get_host_cpu_features().get("f16c"):
        return "this processor lacks the instructions f16c"
    return None


def compiled(assembly: str) -> llvm.ExecutionEngine:
    """Return the functions of a module, by `get_function_address`; the result owns their code.

    No flag allows LLVM to contract operations, so each one is rounded separately
    (https://llvm.org/docs/LangRef.html#fast-math-flags).
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly(assembly)
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    engine = llvm.create_mcjit_compiler(module, machine)  # the machine now belongs to it
    engine.finalize_object()
    return engine
