# row_products, and libggml-cpu for some instruction sets: <set>-ours and <set>-stock, whose repack.cpp, ggml-cpu.c and
# tiled/ are those of STEERMOE_STOCK_TREE, vnni-ours and off-ours. All use the libggml-base of STEERMOE_LIBS. Run by tests/support/row_products.py.

find_library(lib_ggml-base ggml-base PATHS ${STEERMOE_LIBS} NO_DEFAULT_PATH REQUIRED)
set(STEERMOE_ROWS_SANITIZERS "" CACHE STRING "sanitizers of row_products and libggml-cpu")
set(STEERMOE_STOCK_TREE "" CACHE PATH "the llama.cpp tree without patches; empty: row_products alone")

add_library(rows_common INTERFACE)
target_include_directories(rows_common INTERFACE ${GGML}/include ${GGML}/src)
target_link_libraries(rows_common INTERFACE ${lib_ggml-base} Threads::Threads ${CMAKE_DL_LIBS})
set(rows_optimization -O3)
# of the programs and of what is compared; what only has to be there is not instrumented
add_library(rows_tested INTERFACE)
target_link_libraries(rows_tested INTERFACE rows_common)
if(STEERMOE_ROWS_SANITIZERS)
    set(rows_optimization -O1 -g1 -fexpensive-optimizations) # which fuses multiplications and additions, as -O3
    target_compile_options(rows_tested INTERFACE
        -fsanitize=${STEERMOE_ROWS_SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(rows_tested INTERFACE -fsanitize=${STEERMOE_ROWS_SANITIZERS})
endif()

add_executable(row_products row_products.cpp)
target_compile_options(row_products PRIVATE -O1 -Wall -Wextra)
target_link_libraries(row_products PRIVATE rows_tested)
set_target_properties(row_products PROPERTIES BUILD_RPATH ${STEERMOE_LIBS})

if(NOT STEERMOE_STOCK_TREE)
    return()
endif()

# Where the wait of ggml's own threads is a busy loop, more threads than cores take long.
if(NOT STEERMOE_ROWS_SANITIZERS MATCHES thread)
    find_package(OpenMP)
    if(OpenMP_CXX_FOUND)
        target_link_libraries(rows_common INTERFACE OpenMP::OpenMP_CXX)
        target_compile_definitions(rows_common INTERFACE GGML_USE_OPENMP)
    endif()
endif()

set(native_flags -march=native)
set(avx2_flags -msse4.2 -mavx -mavx2 -mfma -mf16c -mbmi2)
set(avx512_flags ${avx2_flags} -mavx512f -mavx512cd -mavx512vl -mavx512dq -mavx512bw)

set(cpu ${GGML}/src/ggml-cpu)
set(dot_rows ${ROOT}/native/src/ggml/dot-rows.cpp)
# what is a kernel or chooses one, hence built for each set
set(kernels ${cpu}/quants.c ${cpu}/vec.cpp ${cpu}/arch/x86/quants.c ${cpu}/arch/x86/repack.cpp)
file(GLOB others ${cpu}/*.c ${cpu}/*.cpp ${cpu}/amx/*.cpp)
list(REMOVE_ITEM others ${cpu}/repack.cpp ${cpu}/ggml-cpu.c ${cpu}/quants.c ${cpu}/vec.cpp)

# Objects with the options of ggml's own CMakeLists.txt.
function(add_rows_objects name tree)
    add_library(${name} OBJECT ${ARGN})
    set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON C_STANDARD 11)
    target_include_directories(${name} PRIVATE ${tree}/ggml/src/ggml-cpu)
    target_compile_definitions(${name} PRIVATE
        GGML_SHARED GGML_BACKEND_SHARED GGML_BACKEND_BUILD GGML_SCHED_MAX_COPIES=4 GGML_USE_CPU_REPACK
        _GNU_SOURCE _XOPEN_SOURCE=600)
    target_compile_options(${name} PRIVATE -DNDEBUG -w)
    target_link_libraries(${name} PRIVATE rows_common)
endfunction()

# A libggml-cpu of the kernels of a set, and what the patches change in a tree.
function(add_rows_library name set tree)
    set(tree_cpu ${tree}/ggml/src/ggml-cpu)
    add_rows_objects(${name}-rows ${tree} ${tree_cpu}/repack.cpp ${tree_cpu}/ggml-cpu.c
        ${tree_cpu}/tiled/tiled.cpp ${tree_cpu}/tiled/tiled-kernel.cpp ${ARGN})
    target_compile_options(${name}-rows PRIVATE ${rows_optimization} ${${set}_flags})
    target_link_libraries(${name}-rows PRIVATE rows_tested)
    add_library(${name} MODULE
        $<TARGET_OBJECTS:rows_others> $<TARGET_OBJECTS:${set}-kernels> $<TARGET_OBJECTS:${name}-rows>)
    target_link_libraries(${name} PRIVATE rows_tested)
    set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so" BUILD_RPATH ${STEERMOE_LIBS})
endfunction()

add_rows_objects(rows_others ${STEERMOE_TREE} ${others})
target_compile_options(rows_others PRIVATE -O0 ${avx2_flags})
target_include_directories(rows_others PRIVATE ${ROOT}/native/src/ggml)
foreach(set native avx2 avx512)
    add_rows_objects(${set}-kernels ${STEERMOE_TREE} ${kernels})
    target_compile_options(${set}-kernels PRIVATE ${rows_optimization} ${${set}_flags})
    target_link_libraries(${set}-kernels PRIVATE rows_tested)
    add_rows_library(${set}-stock ${set} ${STEERMOE_STOCK_TREE})
    add_rows_library(${set}-ours ${set} ${STEERMOE_TREE} ${dot_rows})
endforeach()
# AVX-VNNI's instruction computed by others; to be compared with avx2-stock
add_rows_library(vnni-ours avx2 ${STEERMOE_TREE} ${dot_rows})
target_compile_definitions(vnni-ours-rows PRIVATE FAST_EXPERTS_EMULATE_VNNI)
# -DSTEERMOE_FAST_EXPERTS=OFF, and what other processors compile
add_rows_library(off-ours avx2 ${STEERMOE_TREE} ${dot_rows})
target_compile_definitions(off-ours-rows PRIVATE GGML_CPU_NO_FAST_EXPERTS)
foreach(library native-ours avx2-ours avx512-ours vnni-ours off-ours)
    target_include_directories(${library}-rows PRIVATE ${ROOT}/native/src/ggml)
endforeach()

include(tile_ops.cmake)
