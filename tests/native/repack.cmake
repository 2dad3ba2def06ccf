# repack_products, and libggml-cpu for some instruction sets: <set>-ours and <set>-stock, whose repack.cpp is that of
# STEERMOE_STOCK_TREE, vnni-ours and off-ours. All use the libggml-base of STEERMOE_LIBS. Run by tests/support/repack_products.py.

find_library(lib_ggml-base ggml-base PATHS ${STEERMOE_LIBS} NO_DEFAULT_PATH REQUIRED)
set(STEERMOE_REPACK_SANITIZERS "" CACHE STRING "sanitizers of repack_products and libggml-cpu")
set(STEERMOE_STOCK_TREE "" CACHE PATH "the llama.cpp tree without patches; empty: repack_products alone")

add_library(repack_common INTERFACE)
target_include_directories(repack_common INTERFACE ${GGML}/include ${GGML}/src)
target_link_libraries(repack_common INTERFACE ${lib_ggml-base} Threads::Threads ${CMAKE_DL_LIBS})
set(repack_optimization -O3)
if(STEERMOE_REPACK_SANITIZERS)
    set(repack_optimization -O1 -g1)
    target_compile_options(repack_common INTERFACE
        -fsanitize=${STEERMOE_REPACK_SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer)
    target_link_options(repack_common INTERFACE -fsanitize=${STEERMOE_REPACK_SANITIZERS})
endif()

add_executable(repack_products repack_products.cpp)
target_compile_options(repack_products PRIVATE -O1 -Wall -Wextra)
target_link_libraries(repack_products PRIVATE repack_common)
set_target_properties(repack_products PROPERTIES BUILD_RPATH ${STEERMOE_LIBS})

if(NOT STEERMOE_STOCK_TREE)
    return()
endif()

# Where the wait of ggml's own threads is a busy loop, more threads than cores take long.
if(NOT STEERMOE_REPACK_SANITIZERS MATCHES thread)
    find_package(OpenMP)
    if(OpenMP_CXX_FOUND)
        target_link_libraries(repack_common INTERFACE OpenMP::OpenMP_CXX)
        target_compile_definitions(repack_common INTERFACE GGML_USE_OPENMP)
    endif()
endif()

set(native_flags -march=native)
set(avx2_flags -msse4.2 -mavx -mavx2 -mfma -mf16c -mbmi2)
set(avx512_flags ${avx2_flags} -mavx512f -mavx512cd -mavx512vl -mavx512dq -mavx512bw)

set(cpu ${GGML}/src/ggml-cpu)
set(stock_cpu ${STEERMOE_STOCK_TREE}/ggml/src/ggml-cpu)
# what is a kernel or chooses one, hence built for each set
set(kernels ${cpu}/quants.c ${cpu}/arch/x86/quants.c ${cpu}/arch/x86/repack.cpp)
file(GLOB others ${cpu}/*.c ${cpu}/*.cpp ${cpu}/amx/*.cpp ${cpu}/tiled/*.cpp)
list(REMOVE_ITEM others ${cpu}/repack.cpp ${cpu}/quants.c)

# Objects with the options of ggml's own CMakeLists.txt.
function(add_repack_objects name tree)
    add_library(${name} OBJECT ${ARGN})
    set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON C_STANDARD 11)
    target_include_directories(${name} PRIVATE ${tree}/ggml/src/ggml-cpu)
    target_compile_definitions(${name} PRIVATE
        GGML_SHARED GGML_BACKEND_SHARED GGML_BACKEND_BUILD GGML_SCHED_MAX_COPIES=4 GGML_USE_CPU_REPACK
        _GNU_SOURCE _XOPEN_SOURCE=600)
    target_compile_options(${name} PRIVATE -DNDEBUG -w)
    target_link_libraries(${name} PRIVATE repack_common)
endfunction()

# A libggml-cpu of the kernels of a set, and the repack.cpp of a tree.
function(add_repack_library name set tree repack)
    add_repack_objects(${name}-repack ${tree} ${repack})
    target_compile_options(${name}-repack PRIVATE ${repack_optimization} ${${set}_flags})
    add_library(${name} MODULE
        $<TARGET_OBJECTS:repack_others> $<TARGET_OBJECTS:${set}-kernels> $<TARGET_OBJECTS:${name}-repack>)
    target_link_libraries(${name} PRIVATE repack_common)
    set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so" BUILD_RPATH ${STEERMOE_LIBS})
endfunction()

add_repack_objects(repack_others ${STEERMOE_TREE} ${others})
target_compile_options(repack_others PRIVATE -O0 ${avx2_flags})
target_include_directories(repack_others PRIVATE ${ROOT}/native/src/ggml)
foreach(set native avx2 avx512)
    add_repack_objects(${set}-kernels ${STEERMOE_TREE} ${kernels})
    target_compile_options(${set}-kernels PRIVATE ${repack_optimization} ${${set}_flags})
    add_repack_library(${set}-stock ${set} ${STEERMOE_STOCK_TREE} ${stock_cpu}/repack.cpp)
    add_repack_library(${set}-ours ${set} ${STEERMOE_TREE} ${cpu}/repack.cpp)
endforeach()
# AVX-VNNI's instruction computed by others; to be compared with avx2-stock
add_repack_library(vnni-ours avx2 ${STEERMOE_TREE} ${cpu}/repack.cpp)
target_compile_definitions(vnni-ours-repack PRIVATE REPACK_ROWS_EMULATE_VNNI)
# -DSTEERMOE_FAST_EXPERTS=OFF, and what other processors compile
add_repack_library(off-ours avx2 ${STEERMOE_TREE} ${cpu}/repack.cpp)
target_compile_definitions(off-ours-repack PRIVATE GGML_CPU_NO_REPACK_ROWS)
foreach(library native-ours avx2-ours avx512-ours vnni-ours off-ours)
    target_include_directories(${library}-repack PRIVATE ${ROOT}/native/src/ggml)
endforeach()

include(tile_ops.cmake)
