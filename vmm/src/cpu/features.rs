//! Names of CPUID feature bits, and the psABI levels as masks over them.
//!
//! Sources: Intel SDM volume 2A "CPUID", AMD APM volume 3 appendix E, linux
//! `Documentation/virt/kvm/x86/cpuid.rst` for leaf 0x4000_0001, and the x86-64 psABI, section
//! "Micro-Architecture Levels", for what a level requires.

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One feature word: a register of a leaf whose bits are features.
pub(crate) struct FeatureWord {
    pub(crate) function: u32,
    pub(crate) index: u32,
    pub(crate) register: Register,
    /// Bits that say nothing about the host: the VMM or the guest sets them, or KVM emulates them
    /// on every host.
    pub(crate) host_independent: u32,
    /// What each psABI level requires here.
    pub(crate) v2_required: u32,
    pub(crate) v3_required: u32,
    /// What the named baselines let through beside that, where the host has it: what every
    /// 64-bit CPU has, what KVM itself emulates, and what protects a guest's kernel.
    pub(crate) baseline_optional: u32,
    /// Names from bit 0 up; an empty name or the end of the list is an unnamed bit.
    pub(crate) names: &'static [&'static str],
}

impl FeatureWord {
    /// The name of a bit: as the kernel's `/proc/cpuinfo` has it, or its position.
    pub(crate) fn bit_name(&self, bit: u32) -> String {
        let known = usize::try_from(bit)
            .ok()
            .and_then(|bit| self.names.get(bit));
        match known {
            Some(name) if !name.is_empty() => (*name).to_owned(),
            _ => format!(
                "cpuid {:#x}.{}:{:?}[{bit}]",
                self.function, self.index, self.register
            )
            .to_lowercase(),
        }
    }

    /// Names of all bits that are set in `bits`.
    pub(crate) fn bit_names(&self, bits: u32) -> impl Iterator<Item = String> + '_ {
        (0..32)
            .filter(move |bit| bits & (1 << bit) != 0)
            .map(|bit| self.bit_name(bit))
    }
}

/// A mask with the given bits.
const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < list.len() {
        mask |= 1 << list[i];
        i += 1;
    }
    mask
}

// Leaf 1, ECX.
const SSE3: u32 = 0;
const SSSE3: u32 = 9;
const FMA: u32 = 12;
const CX16: u32 = 13;
const SSE4_1: u32 = 19;
const SSE4_2: u32 = 20;
const X2APIC: u32 = 21;
const MOVBE: u32 = 22;
const POPCNT: u32 = 23;
/// TSC deadline mode of the LAPIC timer: leaf 1, ECX.
pub(crate) const TSC_DEADLINE: u32 = 24;
const XSAVE: u32 = 26;
const OSXSAVE: u32 = 27;
const AVX: u32 = 28;
const F16C: u32 = 29;
/// Virtual machine extensions, and capabilities of performance monitoring: leaf 1, ECX.
const VMX: u32 = 5;
const PDCM: u32 = 15;
/// "Runs under a hypervisor": leaf 1, ECX.
pub(crate) const HYPERVISOR: u32 = 31;
/// "Has more than one logical processor": leaf 1, EDX.
pub(crate) const HTT: u32 = 28;

// Leaf 7, EBX.
const SGX: u32 = 2;
const SMEP: u32 = 7;
const SMAP: u32 = 20;
const INTEL_PT: u32 = 25;
// Leaf 7, ECX.
const UMIP: u32 = 2;
// Leaf 7, EDX.
const ARCH_LBR: u32 = 19;
/// `IA32_ARCH_CAPABILITIES` exists: leaf 7, EDX.
pub(crate) const ARCH_CAPABILITIES: u32 = 29;
/// srbds_ctrl, md_clear, spec_ctrl, stibp, flush_l1d, arch_capabilities, ssbd.
const LEAF_7_EDX_MITIGATIONS: u32 = bits(&[9, 10, 26, 27, 28, ARCH_CAPABILITIES, 31]);
/// psfd, ipred_ctrl, rrsba_ctrl, ddpd_u, bhi_ctrl, mcdt_no.
const LEAF_7_2_EDX_MITIGATIONS: u32 = bits(&[0, 1, 2, 3, 4, 5]);

// Leaf 0x8000_0001, ECX.
const SVM: u32 = 2;
const IBS: u32 = 10;
const SKINIT: u32 = 12;
const PERFCTR_CORE: u32 = 23;
const PERFCTR_NB: u32 = 24;
const PERFCTR_LLC: u32 = 28;
/// ibpb, ibrs, stibp, stibp_always_on, ibrs_same_mode, ssbd, virt_ssbd, ssb_no, psfd, btc_no, ibpb_ret.
const LEAF_8000_0008_EBX_MITIGATIONS: u32 = bits(&[12, 14, 15, 17, 19, 24, 25, 26, 28, 29, 30]);
/// lfence_rdtsc, verw_clear, null_sel_clr_base, autoibrs, sbpb, ibpb_brtype, srso_no,
/// srso_user_kernel_no.
const LEAF_8000_0021_EAX_MITIGATIONS: u32 = bits(&[2, 5, 6, 8, 27, 28, 29, 30]);

/// Bits that no VM of ours has, whatever the host: nested virtualisation, whose state is not saved,
/// performance counters, traces and branch records, which tell of other tenants, and enclaves.
pub(crate) const HIDDEN_BITS: &[(u32, u32, Register, u32)] = &[
    (1, 0, Register::Ecx, bits(&[VMX, PDCM])),
    (7, 0, Register::Ebx, bits(&[SGX, INTEL_PT])),
    (7, 0, Register::Edx, bits(&[ARCH_LBR])),
    (
        0x8000_0001,
        0,
        Register::Ecx,
        bits(&[SVM, IBS, SKINIT, PERFCTR_CORE, PERFCTR_NB, PERFCTR_LLC]),
    ),
];

/// Leaves that describe what [`HIDDEN_BITS`] hides: performance counters, SGX, processor trace, branch
/// records, SVM, IBS, memory encryption, version 2 of AMD's counters.
pub(crate) const HIDDEN_LEAVES: &[u32] = &[
    0xa,
    0x12,
    0x14,
    0x1c,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0022,
];

/// Leaves that say nothing of features: vendor and highest leaf, caches, monitoring, power, topology,
/// clocks, TLBs, KVM's signature and timing, brand, optimisations.
const DESCRIPTIONS: &[u32] = &[
    0,
    2,
    4,
    5,
    6,
    0xb,
    0x15,
    0x16,
    0x17,
    0x18,
    0x1f,
    0x4000_0000,
    0x4000_0010,
    0x8000_0000,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_0019,
    0x8000_001a,
    0x8000_001d,
    0x8000_001e,
    0x8000_0026,
];

/// Registers of leaves with feature words that hold no features: family and APIC id, the highest
/// subleaf, sizes that KVM computes, hints, power, address widths (compared by themselves) and core
/// counts, sizes of microcode.
const DESCRIBING_REGISTERS: &[(u32, u32, &[Register])] = &[
    (1, 0, &[Register::Eax, Register::Ebx]),
    (7, 0, &[Register::Eax]),
    (0xd, 0, &[Register::Ebx, Register::Ecx]),
    (0xd, 1, &[Register::Ebx]),
    (0x4000_0001, 0, &[Register::Edx]),
    (0x8000_0001, 0, &[Register::Eax, Register::Ebx]),
    (
        0x8000_0007,
        0,
        &[Register::Eax, Register::Ebx, Register::Ecx],
    ),
    (
        0x8000_0008,
        0,
        &[Register::Eax, Register::Ecx, Register::Edx],
    ),
    (0x8000_0021, 0, &[Register::Ebx]),
];

/// Whether a register of a leaf may differ between the host that a VM was saved on and one that it is
/// restored on, or is compared bit by bit through [`WORDS`]. All others must be the same.
pub(crate) fn is_compared_otherwise(function: u32, index: u32, register: Register) -> bool {
    DESCRIPTIONS.contains(&function)
        || DESCRIBING_REGISTERS
            .iter()
            .any(|(leaf, subleaf, registers)| {
                (*leaf, *subleaf) == (function, index) && registers.contains(&register)
            })
        || WORDS
            .iter()
            .any(|word| (word.function, word.index, word.register) == (function, index, register))
}

const LEAF_1_ECX_V2: u32 = bits(&[SSE3, SSSE3, CX16, SSE4_1, SSE4_2, POPCNT]);
const LEAF_1_ECX_V3: u32 = LEAF_1_ECX_V2 | bits(&[FMA, MOVBE, XSAVE, AVX, F16C]);
/// fpu, tsc, cx8, cmov, mmx, fxsr, sse, sse2: the first level, which every level contains.
const LEAF_1_EDX_V1: u32 = bits(&[0, 4, 8, 15, 23, 24, 25, 26]);
/// vme, de, pse, msr, pae, mce, apic, sep, mtrr, pge, mca, pat, pse36, clflush.
const LEAF_1_EDX_OPTIONAL: u32 = bits(&[1, 2, 3, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17, 19]);

/// Every feature word that is compared between a saved VM and a host.
pub(crate) const WORDS: &[FeatureWord] = &[
    FeatureWord {
        function: 1,
        index: 0,
        register: Register::Ecx,
        host_independent: bits(&[X2APIC, OSXSAVE, HYPERVISOR]),
        v2_required: LEAF_1_ECX_V2,
        v3_required: LEAF_1_ECX_V3,
        baseline_optional: bits(&[X2APIC, TSC_DEADLINE, HYPERVISOR]),
        names: &[
            "sse3",
            "pclmulqdq",
            "dtes64",
            "monitor",
            "ds_cpl",
            "vmx",
            "smx",
            "est",
            "tm2",
            "ssse3",
            "cid",
            "sdbg",
            "fma",
            "cx16",
            "xtpr",
            "pdcm",
            "",
            "pcid",
            "dca",
            "sse4_1",
            "sse4_2",
            "x2apic",
            "movbe",
            "popcnt",
            "tsc_deadline_timer",
            "aes",
            "xsave",
            "osxsave",
            "avx",
            "f16c",
            "rdrand",
            "hypervisor",
        ],
    },
    FeatureWord {
        function: 1,
        index: 0,
        register: Register::Edx,
        host_independent: bits(&[9, HTT]),
        v2_required: LEAF_1_EDX_V1,
        v3_required: LEAF_1_EDX_V1,
        baseline_optional: LEAF_1_EDX_OPTIONAL,
        names: &[
            "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "", "sep",
            "mtrr", "pge", "mca", "cmov", "pat", "pse36", "pn", "clflush", "", "dts", "acpi",
            "mmx", "fxsr", "sse", "sse2", "ss", "ht", "tm", "ia64", "pbe",
        ],
    },
    FeatureWord {
        function: 7,
        index: 0,
        register: Register::Ebx,
        host_independent: 0,
        v2_required: 0,
        v3_required: bits(&[3, 5, 8]),
        baseline_optional: bits(&[SMEP, SMAP]),
        names: &[
            "fsgsbase",
            "tsc_adjust",
            "sgx",
            "bmi1",
            "hle",
            "avx2",
            "",
            "smep",
            "bmi2",
            "erms",
            "invpcid",
            "rtm",
            "cqm",
            "",
            "mpx",
            "rdt_a",
            "avx512f",
            "avx512dq",
            "rdseed",
            "adx",
            "smap",
            "avx512ifma",
            "",
            "clflushopt",
            "clwb",
            "intel_pt",
            "avx512pf",
            "avx512er",
            "avx512cd",
            "sha_ni",
            "avx512bw",
            "avx512vl",
        ],
    },
    FeatureWord {
        function: 7,
        index: 0,
        register: Register::Ecx,
        host_independent: bits(&[4]),
        v2_required: 0,
        v3_required: 0,
        baseline_optional: bits(&[UMIP]),
        names: &[
            "prefetchwt1",
            "avx512vbmi",
            "umip",
            "pku",
            "ospke",
            "waitpkg",
            "avx512_vbmi2",
            "shstk",
            "gfni",
            "vaes",
            "vpclmulqdq",
            "avx512_vnni",
            "avx512_bitalg",
            "tme",
            "avx512_vpopcntdq",
            "",
            "la57",
            "",
            "",
            "",
            "",
            "",
            "rdpid",
            "",
            "bus_lock_detect",
            "cldemote",
            "",
            "movdiri",
            "movdir64b",
            "enqcmd",
            "sgx_lc",
            "pks",
        ],
    },
    FeatureWord {
        function: 7,
        index: 0,
        register: Register::Edx,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: LEAF_7_EDX_MITIGATIONS,
        names: &[
            "",
            "",
            "avx512_4vnniw",
            "avx512_4fmaps",
            "fsrm",
            "",
            "",
            "",
            "avx512_vp2intersect",
            "srbds_ctrl",
            "md_clear",
            "",
            "",
            "",
            "serialize",
            "hybrid_cpu",
            "tsxldtrk",
            "",
            "pconfig",
            "arch_lbr",
            "ibt",
            "",
            "amx_bf16",
            "avx512_fp16",
            "amx_tile",
            "amx_int8",
            "spec_ctrl",
            "intel_stibp",
            "flush_l1d",
            "arch_capabilities",
            "core_capabilities",
            "spec_ctrl_ssbd",
        ],
    },
    FeatureWord {
        function: 7,
        index: 1,
        register: Register::Eax,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: 0,
        names: &["sha512", "sm3", "sm4", "", "avx_vnni", "avx512_bf16"],
    },
    FeatureWord {
        function: 7,
        index: 1,
        register: Register::Edx,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: 0,
        names: &["", "", "", "", "avx_vnni_int8", "avx_ne_convert"],
    },
    FeatureWord {
        function: 7,
        index: 2,
        register: Register::Edx,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: LEAF_7_2_EDX_MITIGATIONS,
        names: &[
            "intel_psfd",
            "ipred_ctrl",
            "rrsba_ctrl",
            "ddpd_u",
            "bhi_ctrl",
            "mcdt_no",
        ],
    },
    FeatureWord {
        function: 0xd,
        index: 0,
        register: Register::Eax,
        host_independent: 0,
        v2_required: 0,
        v3_required: bits(&[0, 1, 2]),
        baseline_optional: 0,
        names: &[
            "xcr0:x87",
            "xcr0:sse",
            "xcr0:avx",
            "xcr0:bndregs",
            "xcr0:bndcsr",
        ],
    },
    FeatureWord {
        function: 0xd,
        index: 1,
        register: Register::Eax,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: 0,
        names: &["xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd"],
    },
    FeatureWord {
        function: 0xd,
        index: 1,
        register: Register::Ecx,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: 0,
        names: &[
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "xss:pt",
            "",
            "xss:pasid",
            "xss:cet_u",
            "xss:cet_s",
        ],
    },
    FeatureWord {
        function: 0x8000_0001,
        index: 0,
        register: Register::Ecx,
        host_independent: bits(&[1, 22]),
        v2_required: bits(&[0]),
        v3_required: bits(&[0, 5]),
        baseline_optional: 0,
        names: &[
            "lahf_lm",
            "cmp_legacy",
            "svm",
            "extapic",
            "cr8_legacy",
            "abm",
            "sse4a",
            "misalignsse",
            "3dnowprefetch",
            "osvw",
            "ibs",
            "xop",
            "skinit",
            "wdt",
            "",
            "lwp",
            "fma4",
            "tce",
            "",
            "nodeid_msr",
            "",
            "tbm",
            "topoext",
            "perfctr_core",
            "perfctr_nb",
            "",
            "bpext",
            "ptsc",
            "perfctr_llc",
            "mwaitx",
        ],
    },
    FeatureWord {
        function: 0x8000_0001,
        index: 0,
        register: Register::Edx,
        // The bits of leaf 1 that AMD repeats here are judged there.
        host_independent: 0x0183_f3ff,
        v2_required: bits(&[11, 29]),
        v3_required: bits(&[11, 29]),
        baseline_optional: bits(&[20]) | 0x0183_f3ff,
        names: &[
            "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "", "syscall",
            "mtrr", "pge", "mca", "cmov", "pat", "pse36", "", "mp", "nx", "", "mmxext", "mmx",
            "fxsr", "fxsr_opt", "pdpe1gb", "rdtscp", "", "lm", "3dnowext", "3dnow",
        ],
    },
    FeatureWord {
        function: 0x8000_0007,
        index: 0,
        register: Register::Edx,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: bits(&[8]),
        names: &["", "", "", "", "", "", "", "", "nonstop_tsc"],
    },
    FeatureWord {
        function: 0x8000_0008,
        index: 0,
        register: Register::Ebx,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: LEAF_8000_0008_EBX_MITIGATIONS,
        names: &[
            "clzero",
            "irperf",
            "xsaveerptr",
            "",
            "rdpru",
            "",
            "",
            "",
            "",
            "wbnoinvd",
            "",
            "",
            "amd_ibpb",
            "",
            "amd_ibrs",
            "amd_stibp",
            "",
            "amd_stibp_always_on",
            "",
            "",
            "",
            "",
            "",
            "",
            "amd_ssbd",
            "virt_ssbd",
            "amd_ssb_no",
            "",
            "amd_psfd",
            "btc_no",
            "ibpb_ret",
        ],
    },
    FeatureWord {
        function: 0x8000_0021,
        index: 0,
        register: Register::Eax,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: LEAF_8000_0021_EAX_MITIGATIONS,
        names: &[
            "no_nested_data_bp",
            "wrmsr_fsgsbase_ns",
            "lfence_rdtsc",
            "",
            "",
            "verw_clear",
            "null_sel_clr_base",
            "",
            "autoibrs",
            "no_smm_ctl_msr",
            "fsrs",
            "fsrc",
            "",
            "prefetchi",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "sbpb",
            "ibpb_brtype",
            "srso_no",
            "srso_user_kernel_no",
        ],
    },
    FeatureWord {
        function: 0x8000_0021,
        index: 0,
        register: Register::Ecx,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        baseline_optional: bits(&[1, 2]),
        names: &["", "tsa_sq_no", "tsa_l1_no"],
    },
    FeatureWord {
        function: 0x4000_0001,
        index: 0,
        register: Register::Eax,
        host_independent: 0,
        v2_required: 0,
        v3_required: 0,
        // kvmclock (both generations), no I/O delay, steal time, paravirtual EOI and unhalt,
        // stable clock: in every kernel of the last ten years.
        baseline_optional: bits(&[0, 1, 3, 5, 6, 7, 24]),
        names: &[
            "kvm_clocksource",
            "kvm_nop_io_delay",
            "kvm_mmu_op",
            "kvm_clocksource2",
            "kvm_async_pf",
            "kvm_steal_time",
            "kvm_pv_eoi",
            "kvm_pv_unhalt",
            "",
            "kvm_pv_tlb_flush",
            "kvm_async_pf_vmexit",
            "kvm_pv_send_ipi",
            "kvm_poll_control",
            "kvm_pv_sched_yield",
            "kvm_async_pf_int",
            "kvm_msi_ext_dest_id",
            "kvm_hc_map_gpa_range",
            "kvm_migration_control",
        ],
    },
];
