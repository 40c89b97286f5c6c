//! What the guest's CPUID instruction says: the host's features or a named baseline, the VM's own
//! topology, and the check that a host can carry on with what a saved VM was told.
//!
//! The CPUID that a VM was started with is part of its saved state and never changes. A named
//! baseline is the level's list, and of the rest only what protects the guest's kernel where the host
//! has it (SMEP, SMAP, UMIP, the controls of speculation): such a VM restores on any host that has the
//! level and protects as well. Nested virtualisation and performance counters are in no model.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Kvm;

use super::features::{
    ARCH_CAPABILITIES, FeatureWord, HIDDEN_BITS, HIDDEN_LEAVES, HTT, HYPERVISOR, Register,
    TSC_DEADLINE, WORDS, is_compared_otherwise,
};
use crate::config::CpuModel;

/// KVM's signature leaf; its EAX is the highest leaf of that range.
const KVM_SIGNATURE: u32 = 0x4000_0000;
/// Timing leaf, as other hypervisors define it too: EAX = TSC kHz, EBX = LAPIC bus kHz.
const KVM_TIMING: u32 = 0x4000_0010;
/// KVM's LAPIC bus runs at 1 GHz (`APIC_BUS_CYCLE_NS` of 1).
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Highest basic and extended leaf that a named baseline has.
const BASELINE_LEAF_MAX: u32 = 0xd;
const BASELINE_EXTENDED_MAX: u32 = 0x8000_0008;
/// AMD's leaf of further mitigations, which a baseline has beyond that.
const AMD_MITIGATIONS: u32 = 0x8000_0021;
/// x87, SSE and AVX state: bytes of an XSAVE area in the standard format.
const XSAVE_AVX_BYTES: u32 = 0x340;

/// Why a CPUID table is refused.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// The host's table cannot be read.
    #[error("KVM does not tell its supported CPUID")]
    Supported(#[source] kvm_ioctls::Error),
    /// The host lacks features that the asked-for baseline has.
    #[error("this host cannot give {model}: its KVM lacks {missing}")]
    BaselineMissing {
        /// The baseline.
        model: CpuModel,
        /// Names of the missing features.
        missing: String,
    },
    /// The host lacks features that the saved VM was started with.
    #[error(
        "this host cannot continue the VM: its KVM lacks {missing}, which the VM was told it has"
    )]
    RestoreMissing {
        /// Names of the missing features.
        missing: String,
    },
    /// A saved table that no VM of ours can have had.
    #[error("a saved CPUID table has {0} entries; the limit is {KVM_MAX_CPUID_ENTRIES}")]
    TooMany(usize),
}

/// What this host's KVM supports. Reading it takes half a millisecond, so it is read once a VM.
pub struct HostCpuid {
    entries: Vec<kvm_cpuid_entry2>,
}

impl HostCpuid {
    /// Ask KVM. `tsc_deadline` is whether `KVM_CAP_TSC_DEADLINE_TIMER` is there: KVM leaves that
    /// bit out of its table because it depends on the in-kernel irqchip, which we always have.
    ///
    /// # Errors
    /// KVM refuses to tell.
    pub fn read(kvm: &Kvm, tsc_deadline: bool) -> Result<HostCpuid, CpuidError> {
        let table = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(CpuidError::Supported)?;
        let mut host = HostCpuid {
            entries: table.as_slice().to_vec(),
        };
        if let Some(leaf) = find_mut(&mut host.entries, 1, 0) {
            leaf.ecx |= 1 << HYPERVISOR;
            if tsc_deadline {
                leaf.ecx |= 1 << TSC_DEADLINE;
            } else {
                leaf.ecx &= !(1 << TSC_DEADLINE);
            }
        }
        hide(&mut host.entries);
        Ok(host)
    }

    /// The table that all vCPUs of a new VM share, before [`for_vcpu`] adds each one's identity.
    ///
    /// # Errors
    /// The host lacks something that the baseline has.
    pub fn template(
        &self,
        model: CpuModel,
        tsc_khz: u32,
    ) -> Result<Vec<kvm_cpuid_entry2>, CpuidError> {
        let mut entries = self.entries.clone();
        // Topology leaves are ours to write; leaf 0x1f would overrule 0xb.
        entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f));
        if model != CpuModel::Host {
            self.check_baseline(model)?;
            apply_baseline(&mut entries, model);
        }
        if let Some(leaf) = find_mut(&mut entries, 0, 0) {
            leaf.eax = leaf.eax.max(0xb);
        }
        if let Some(leaf) = find_mut(&mut entries, KVM_SIGNATURE, 0) {
            leaf.eax = KVM_TIMING;
        }
        entries.retain(|entry| entry.function != KVM_TIMING);
        entries.push(kvm_cpuid_entry2 {
            function: KVM_TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        });
        Ok(entries)
    }

    /// Registers of saved leaves that hold something which is not compared bit by bit, and that this
    /// host has otherwise or not at all: layouts, such as where XSAVE keeps a component, and leaves
    /// of a later day.
    fn differing<'a>(
        &'a self,
        saved: &'a [kvm_cpuid_entry2],
    ) -> impl Iterator<Item = (&'a kvm_cpuid_entry2, Register)> {
        let registers = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx];
        let pairs = saved
            .iter()
            .flat_map(move |entry| registers.map(|register| (entry, register)));
        pairs.filter(|(entry, register)| {
            let value = register_of(entry, *register);
            let here = find(&self.entries, entry.function, entry.index);
            value != 0
                && !is_compared_otherwise(entry.function, entry.index, *register)
                && here.is_none_or(|here| register_of(here, *register) != value)
        })
    }

    fn check_baseline(&self, model: CpuModel) -> Result<(), CpuidError> {
        let missing = missing_names(|word| required(word, model) & !word_of(&self.entries, word));
        if missing.is_empty() {
            return Ok(());
        }
        Err(CpuidError::BaselineMissing { model, missing })
    }

    /// Check that this host has everything that a saved VM was told.
    ///
    /// # Errors
    /// Names what is missing.
    pub fn check_restorable(&self, saved: &[kvm_cpuid_entry2]) -> Result<(), CpuidError> {
        if saved.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(CpuidError::TooMany(saved.len()));
        }
        let mut missing = missing_names(|word| {
            word_of(saved, word) & !word.host_independent & !word_of(&self.entries, word)
        });
        let address_bits = |entries: &[kvm_cpuid_entry2]| {
            find(entries, 0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff)
        };
        let (had, has) = (address_bits(saved), address_bits(&self.entries));
        if had > has {
            if !missing.is_empty() {
                missing.push_str(", ");
            }
            missing.push_str(&format!("{had} bits of physical address (it has {has})"));
        }
        for (entry, register) in self.differing(saved) {
            if !missing.is_empty() {
                missing.push_str(", ");
            }
            let (function, index) = (entry.function, entry.index);
            missing.push_str(&format!("cpuid {function:#x}.{index}:{register:?}").to_lowercase());
        }
        if missing.is_empty() {
            return Ok(());
        }
        Err(CpuidError::RestoreMissing { missing })
    }
}

/// Names of all bits for which `bits_of` says that they are missing, comma-separated.
fn missing_names(bits_of: impl Fn(&FeatureWord) -> u32) -> String {
    let names: Vec<String> = WORDS
        .iter()
        .flat_map(|word| word.bit_names(bits_of(word)))
        .collect();
    names.join(", ")
}

fn required(word: &FeatureWord, model: CpuModel) -> u32 {
    match model {
        CpuModel::Host => 0,
        CpuModel::V2 => word.v2_required,
        CpuModel::V3 => word.v3_required,
    }
}

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries
        .iter()
        .find(|entry| entry.function == function && entry.index == index)
}

fn find_mut(
    entries: &mut [kvm_cpuid_entry2],
    function: u32,
    index: u32,
) -> Option<&mut kvm_cpuid_entry2> {
    entries
        .iter_mut()
        .find(|entry| entry.function == function && entry.index == index)
}

fn register_of(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    }
}

fn word_of(entries: &[kvm_cpuid_entry2], word: &FeatureWord) -> u32 {
    find(entries, word.function, word.index).map_or(0, |entry| register_of(entry, word.register))
}

/// Whether a table says that `IA32_ARCH_CAPABILITIES` exists.
#[must_use]
pub fn has_arch_capabilities(entries: &[kvm_cpuid_entry2]) -> bool {
    find(entries, 7, 0).is_some_and(|leaf| leaf.edx & (1 << ARCH_CAPABILITIES) != 0)
}

/// Takes out what no VM has.
fn hide(entries: &mut [kvm_cpuid_entry2]) {
    for &(function, index, register, bits) in HIDDEN_BITS {
        mask(entries, (function, index, register), !bits);
    }
    for entry in entries {
        if HIDDEN_LEAVES.contains(&entry.function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    }
}

/// Leaves of a register what is in `mask`.
fn mask(entries: &mut [kvm_cpuid_entry2], place: (u32, u32, Register), mask: u32) {
    let (function, index, register) = place;
    let Some(entry) = find_mut(entries, function, index) else {
        return;
    };
    match register {
        Register::Eax => entry.eax &= mask,
        Register::Ebx => entry.ebx &= mask,
        Register::Ecx => entry.ecx &= mask,
        Register::Edx => entry.edx &= mask,
    }
}

/// Reduce a host's table to a named baseline.
fn apply_baseline(entries: &mut Vec<kvm_cpuid_entry2>, model: CpuModel) {
    entries.retain(|entry| match entry.function {
        // Only the state components of the level, and no compaction.
        0xd => model == CpuModel::V3 && matches!(entry.index, 0..=2),
        7 => matches!(entry.index, 0 | 2),
        function if function < KVM_SIGNATURE => function <= BASELINE_LEAF_MAX,
        AMD_MITIGATIONS => true,
        function if function >= 0x8000_0000 => function <= BASELINE_EXTENDED_MAX,
        _ => true,
    });
    for word in WORDS {
        mask(
            entries,
            (word.function, word.index, word.register),
            required(word, model) | word.baseline_optional,
        );
    }
    let extended_max = match find(entries, AMD_MITIGATIONS, 0) {
        Some(_) => AMD_MITIGATIONS,
        None => BASELINE_EXTENDED_MAX,
    };
    let leaf_7_max = find(entries, 7, 2).map_or(0, |_| 2);
    for entry in entries.iter_mut() {
        match (entry.function, entry.index) {
            (0, _) => entry.eax = BASELINE_LEAF_MAX,
            (0x8000_0000, _) => entry.eax = extended_max,
            // Of thermal and power management, the always-running LAPIC timer alone.
            (6, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & 4, 0, 0, 0),
            // MONITOR, direct cache access: hidden.
            (5 | 9, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (7, 0) => entry.eax = leaf_7_max,
            (7, 2) => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
            (AMD_MITIGATIONS, _) => (entry.ebx, entry.edx) = (0, 0),
            (0xd, 0) => (entry.ebx, entry.ecx, entry.edx) = (XSAVE_AVX_BYTES, XSAVE_AVX_BYTES, 0),
            (0xd, 1) => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
            _ => {}
        }
    }
    let mut brand = [0u8; 48];
    let name = format!("cloudlet {model}");
    brand[..name.len()].copy_from_slice(name.as_bytes());
    for (function, bytes) in (0x8000_0002_u32..).zip(brand.chunks_exact(16)) {
        if let Some(leaf) = find_mut(entries, function, 0) {
            let word = |at: usize| {
                u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            };
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (word(0), word(4), word(8), word(12));
        }
    }
}

/// The shared table with one vCPU's identity: APIC id, and a topology of one package with `cpus`
/// cores of one thread each.
#[must_use]
pub fn for_vcpu(template: &[kvm_cpuid_entry2], id: u8, cpus: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries = template.to_vec();
    let (id, cpus) = (u32::from(id), u32::from(cpus).max(1));
    let shift = cpus.next_power_of_two().trailing_zeros();
    for entry in &mut entries {
        match entry.function {
            1 => {
                let slots = if cpus > 1 { 1 << shift } else { 0 };
                entry.ebx = (entry.ebx & 0xffff) | (slots << 16) | (id << 24);
                entry.edx = (entry.edx & !(1 << HTT)) | (u32::from(cpus > 1) << HTT);
            }
            // Cache descriptions: type in bits 0-4, level in bits 5-7, sharers in bits 14-25,
            // and for Intel the cores of the package in bits 26-31.
            4 if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff) | (sharers(entry.eax, cpus) << 14);
                entry.eax |= (cpus - 1) << 26;
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff) | (sharers(entry.eax, cpus) << 14);
            }
            // Cores minus one, and how many APIC id bits they take.
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (cpus - 1) | (shift << 12),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    let leaf_b = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx,
        edx: id,
        ..Default::default()
    };
    entries.push(leaf_b(0, 0, 1, 1 << 8));
    entries.push(leaf_b(1, shift, cpus, (2 << 8) | 1));
    entries.push(leaf_b(2, 0, 0, 2));
    entries
}

/// How many vCPUs beyond the first share a cache: all of them from level 3 on, none below.
fn sharers(eax: u32, cpus: u32) -> u32 {
    if (eax >> 5) & 7 >= 3 { cpus - 1 } else { 0 }
}

/// The table in the form that `KVM_SET_CPUID2` takes.
///
/// # Errors
/// More entries than KVM takes.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, CpuidError> {
    CpuId::from_entries(entries).map_err(|_| CpuidError::TooMany(entries.len()))
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
