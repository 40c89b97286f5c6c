//! Baselines, refusals and topology, on made-up hosts.

use super::*;

/// A host that has every named feature and more.
fn rich_host() -> HostCpuid {
    let leaf = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let mut host = HostCpuid {
        entries: vec![
            leaf(0, 0, 0x1f, 0, 0, 0),
            leaf(1, 0, 0x00a0_0f11, 0x0808_0800, u32::MAX, u32::MAX),
            leaf(4, 0, 0x7c00_4121, 0, 0, 0),
            leaf(4, 3, 0x7c00_4163, 0, 0, 0),
            leaf(6, 0, 0x77, 2, 9, 0),
            leaf(7, 0, 2, u32::MAX, u32::MAX, u32::MAX),
            leaf(7, 1, u32::MAX, 0, 0, 0),
            leaf(7, 2, 0, 0, 0, u32::MAX),
            leaf(0xa, 0, 5, 6, 7, 8),
            leaf(0xb, 0, 1, 2, 3, 4),
            leaf(0xd, 0, 0x2e7, 0xa88, 0xa88, 0),
            leaf(0xd, 1, 0x1f, 0, 0, 0),
            leaf(0xd, 2, 0x100, 0x240, 0, 0),
            leaf(0xd, 5, 0x40, 0x440, 0, 0),
            leaf(0x1f, 0, 1, 2, 3, 4),
            leaf(0x4000_0000, 0, 0x4000_0001, 0, 0, 0),
            leaf(0x4000_0001, 0, u32::MAX, 0, 0, 0),
            leaf(0x8000_0000, 0, 0x8000_0021, 0, 0, 0),
            leaf(0x8000_0001, 0, 0, 0, u32::MAX, u32::MAX),
            leaf(0x8000_0002, 0, 1, 2, 3, 4),
            leaf(0x8000_0007, 0, 0, 0, 0, 0x100),
            leaf(0x8000_0008, 0, 0x3030, u32::MAX, 0x700f, 0),
            leaf(0x8000_001e, 0, 7, 7, 7, 0),
            leaf(0x8000_000a, 0, 1, 0x8000, 0, u32::MAX),
            leaf(0x8000_0021, 0, u32::MAX, 0xfff, 6, 0),
            leaf(0x8000_0022, 0, 1, 6, 0, 0),
        ],
    };
    hide(&mut host.entries);
    host
}

#[test]
fn baselines_are_what_the_level_has() {
    let host = rich_host();
    let v2 = host.template(CpuModel::V2, 2_000_000).unwrap();
    let v3 = host.template(CpuModel::V3, 2_000_000).unwrap();
    let leaf = |table: &[kvm_cpuid_entry2], function| *find(table, function, 0).unwrap();
    assert_eq!(leaf(&v2, 1).ecx & (1 << 28), 0, "v2 has no AVX");
    assert_ne!(leaf(&v2, 1).ecx & (1 << 20), 0, "v2 has SSE4.2");
    // SMEP and SMAP, and for v3 BMI1, AVX2, BMI2.
    let protections = (1 << 7) | (1 << 20);
    assert_eq!(leaf(&v2, 7).ebx, protections);
    assert_eq!(
        leaf(&v3, 7).ebx,
        (1 << 3) | (1 << 5) | (1 << 8) | protections
    );
    assert_eq!(leaf(&v3, 7).ecx, 1 << 2, "UMIP");
    // SPEC_CTRL, STIBP, ARCH_CAPABILITIES, SSBD, and no AVX-512.
    assert_eq!(leaf(&v3, 7).edx & 0xac00_0000, 0xac00_0000);
    assert_eq!(leaf(&v3, 7).edx & 0xc, 0);
    assert_eq!(leaf(&v3, 7).eax, 2);
    assert_eq!(find(&v3, 7, 2).unwrap().edx, 0x3f);
    assert_ne!(leaf(&v2, 0x8000_0008).ebx & (1 << 12), 0, "IBPB");
    assert_ne!(leaf(&v2, 0x8000_0021).eax & (1 << 8), 0, "automatic IBRS");
    assert_eq!(leaf(&v2, 0x8000_0021).eax & (1 << 9), 0);
    assert_eq!(leaf(&v2, 0x8000_0000).eax, 0x8000_0021);
    assert_eq!(leaf(&v3, 0xd).eax, 7);
    assert!(find(&v2, 0xd, 0).is_none() && find(&v3, 0xd, 5).is_none());
    assert!(find(&v3, 0x1f, 0).is_none() && find(&v3, 7, 1).is_none());
    assert_eq!(leaf(&v2, 0xa).eax, 0);
    assert_eq!(leaf(&v2, 0x4000_0010).eax, 2_000_000);
    assert_eq!(leaf(&v2, 0x4000_0000).eax, 0x4000_0010);
    // The same list comes out of a host that has the level and protects as well, and no more.
    let mut poorer = rich_host();
    find_mut(&mut poorer.entries, 7, 0).unwrap().ebx = (1 << 3) | (1 << 5) | (1 << 8) | protections;
    find_mut(&mut poorer.entries, 7, 0).unwrap().edx = LEAF_7_EDX;
    find_mut(&mut poorer.entries, 0x8000_0001, 0).unwrap().ecx = 0x21;
    assert_eq!(poorer.template(CpuModel::V3, 2_000_000).unwrap(), v3);
}

/// What a baseline has of leaf 7's EDX.
const LEAF_7_EDX: u32 = 0xbc00_0600;

#[test]
fn a_guest_that_was_protected_does_not_go_on_without() {
    let saved = rich_host().template(CpuModel::V2, 1).unwrap();
    let mut host = rich_host();
    find_mut(&mut host.entries, 7, 0).unwrap().ebx &= !(1 << 20);
    find_mut(&mut host.entries, 7, 2).unwrap().edx &= !(1 << 4);
    find_mut(&mut host.entries, 0x8000_0021, 0).unwrap().eax &= !(1 << 8);
    let error = host.check_restorable(&saved).unwrap_err().to_string();
    assert!(error.contains("smap, bhi_ctrl, autoibrs"), "{error}");
}

#[test]
fn no_vm_has_nested_virtualisation_or_counters() {
    for model in [CpuModel::Host, CpuModel::V2, CpuModel::V3] {
        let table = rich_host().template(model, 1).unwrap();
        let leaf = |function| find(&table, function, 0).copied().unwrap_or_default();
        assert_eq!(
            leaf(1).ecx & ((1 << 5) | (1 << 15)),
            0,
            "{model}: VMX, PDCM"
        );
        let hidden = (1 << 2) | (1 << 23) | (1 << 24) | (1 << 28);
        assert_eq!(leaf(0x8000_0001).ecx & hidden, 0, "{model}: SVM, counters");
        for function in [0xa, 0x8000_000a, 0x8000_0022] {
            let leaf = leaf(function);
            let all = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
            assert_eq!(all, [0; 4], "{model}: {function:#x}");
        }
    }
    // A saved state cannot bring it back.
    let mut saved = rich_host().template(CpuModel::Host, 1).unwrap();
    find_mut(&mut saved, 1, 0).unwrap().ecx |= 1 << 5;
    find_mut(&mut saved, 0x8000_0001, 0).unwrap().ecx |= 1 << 2;
    let error = rich_host()
        .check_restorable(&saved)
        .unwrap_err()
        .to_string();
    assert!(error.contains("lacks vmx, svm"), "{error}");
}

#[test]
fn leaves_of_a_later_day_and_layouts_are_compared_whole() {
    let mut saved = rich_host().template(CpuModel::Host, 1).unwrap();
    rich_host().check_restorable(&saved).unwrap();
    find_mut(&mut saved, 0xd, 5).unwrap().ebx = 0x540;
    saved.push(kvm_cpuid_entry2 {
        function: 0x24,
        ebx: 7,
        ..Default::default()
    });
    let error = rich_host()
        .check_restorable(&saved)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("cpuid 0xd.5:ebx, cpuid 0x24.0:ebx"),
        "{error}"
    );
}

#[test]
fn a_missing_feature_is_named() {
    let mut host = rich_host();
    find_mut(&mut host.entries, 7, 0).unwrap().ebx &= !(1 << 5);
    find_mut(&mut host.entries, 1, 0).unwrap().ecx &= !(1 << 12);
    let error = host.template(CpuModel::V3, 1).unwrap_err().to_string();
    assert!(
        error.contains("x86-64-v3") && error.contains("fma, avx2"),
        "{error}"
    );
    host.template(CpuModel::V2, 1).unwrap();

    let saved = rich_host().template(CpuModel::Host, 1).unwrap();
    let error = host.check_restorable(&saved).unwrap_err().to_string();
    assert!(error.contains("fma, avx2"), "{error}");
    let saved = rich_host().template(CpuModel::V2, 1).unwrap();
    host.check_restorable(&saved).unwrap();
}

#[test]
fn narrower_physical_addresses_are_refused() {
    let saved = rich_host().template(CpuModel::Host, 1).unwrap();
    let mut host = rich_host();
    find_mut(&mut host.entries, 0x8000_0008, 0).unwrap().eax = 0x3027;
    let error = host.check_restorable(&saved).unwrap_err().to_string();
    assert!(
        error.contains("48 bits of physical address (it has 39)"),
        "{error}"
    );
}

#[test]
fn bits_that_depend_on_no_host_are_not_compared() {
    let mut saved = rich_host().template(CpuModel::Host, 1).unwrap();
    let mut host = rich_host();
    find_mut(&mut host.entries, 1, 0).unwrap().ecx &= !((1 << 27) | (1 << 21));
    find_mut(&mut host.entries, 1, 0).unwrap().edx &= !(1 << 28);
    host.check_restorable(&saved).unwrap();
    saved.resize(KVM_MAX_CPUID_ENTRIES + 1, kvm_cpuid_entry2::default());
    assert!(matches!(
        host.check_restorable(&saved),
        Err(CpuidError::TooMany(_))
    ));
}

#[test]
fn each_vcpu_has_its_place() {
    let template = rich_host().template(CpuModel::Host, 1).unwrap();
    for cpus in 1..=8u8 {
        let shift = u32::from(cpus).next_power_of_two().trailing_zeros();
        for id in 0..cpus {
            let table = for_vcpu(&template, id, cpus);
            let one = find(&table, 1, 0).unwrap();
            assert_eq!(one.ebx >> 24, u32::from(id));
            assert_eq!(one.edx & (1 << 28) != 0, cpus > 1);
            let cores = find(&table, 0xb, 1).unwrap();
            assert_eq!(
                (cores.eax, cores.ebx, cores.edx),
                (shift, cpus.into(), id.into())
            );
            let l1 = find(&table, 4, 0).unwrap();
            let l3 = find(&table, 4, 3).unwrap();
            assert_eq!(
                ((l1.eax >> 14) & 0xfff, (l3.eax >> 14) & 0xfff),
                (0, u32::from(cpus) - 1)
            );
            assert_eq!(
                find(&table, 0x8000_0008, 0).unwrap().ecx & 0xff,
                u32::from(cpus) - 1
            );
            assert!(to_kvm(&table).is_ok());
        }
    }
}
